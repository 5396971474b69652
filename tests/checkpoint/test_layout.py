"""What of a file is read and checked: tied weights under any of their names, dtypes of tensors in use alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import factory, qwen_image_factory, sana_factory, sd3_factory
from twinflow_rt.errors import CheckpointError
from twinflow_rt.models.text_encoders import clip_text, gemma2, openuni, qwen2_5_vl, qwen3, t5
from twinflow_rt.planning.description import _part
from twinflow_rt.stages.stage import open_part

CPU = torch.device("cpu")


def saved(network, folder):
    network.save_pretrained(folder)
    return folder


def edit(folder, change, **config):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))


def loaded(folder, model):
    part = open_part(folder, model)
    part.load(CPU, torch.float32)
    return part


MODELS = {
    "t5": (sd3_factory.t5_encoder, t5.MODEL, "shared.weight"),
    "qwen3": (lambda: factory.text_encoder(head=True), qwen3.MODEL, "model.embed_tokens.weight"),
    "qwen2.5-vl": (qwen_image_factory.text_encoder, qwen2_5_vl.MODEL, "model.embed_tokens.weight"),
    "gemma2": (lambda: sana_factory.text_encoder(head=True), gemma2.MODEL, "model.embed_tokens.weight"),
    "qwen2": (sana_factory.language_model, openuni.LANGUAGE, "model.embed_tokens.weight"),
}  # fmt: skip
TIED = [
    ("t5", "encoder.embed_tokens.weight"), ("t5", "decoder.embed_tokens.weight"), ("qwen3", "lm_head.weight"),
    ("qwen2.5-vl", "lm_head.weight"), ("gemma2", "lm_head.weight"), ("qwen2", "lm_head.weight"),
    ("qwen2", "language_model.lm_head.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), TIED)
def test_tied_weights_under_their_other_name(tmp_path, kind, name):
    make, model, usual = MODELS[kind]
    folder = saved(make(), tmp_path / "text_encoder")

    def rename(tensors):
        for other in ("lm_head.weight", "encoder.embed_tokens.weight"):
            tensors.pop(other, None)
        tensors[name] = tensors.pop(usual)

    expected = loaded(folder, model).network.state_dict()
    edit(folder, rename, tie_word_embeddings=True)
    part = loaded(folder, model)
    got = part.network.state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[k], v) for k, v in expected.items())
    assert usual.removeprefix("model.") in part.weights()


@pytest.mark.parametrize("kind", ["qwen3", "qwen2.5-vl", "qwen2"])
def test_a_head_of_its_own_is_not_taken_for_the_embeddings(tmp_path, kind):
    make, model, usual = MODELS[kind]
    folder = saved(make(), tmp_path / "text_encoder")
    edit(folder, lambda tensors: tensors.pop(usual), tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is missing, .*tie_word_embeddings: false"):
        loaded(folder, model)


UNREAD = [
    (lambda: sd3_factory.clip_encoder(8, 4, "gelu", False), clip_text.MODEL, "text_model.embeddings.position_ids"),
    (qwen_image_factory.text_encoder, qwen2_5_vl.MODEL, "visual.merger.mlp.0.weight"),
    (qwen_image_factory.text_encoder, qwen2_5_vl.MODEL, "lm_head.weight"),
]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize(("make", "model", "name"), UNREAD)
def test_tensors_that_are_never_read_have_any_dtype(tmp_path, make, model, name, dtype):
    folder = saved(make(), tmp_path / "text_encoder")
    edit(folder, lambda tensors: tensors.update({name: torch.ones(5, 3).to(dtype)}))
    part = loaded(folder, model)
    assert part.checkpoint.main_dtype() == torch.float32
    sizes = {key: tensor.nbytes for key, tensor in load_file(folder / "model.safetensors").items()}
    assert part.checkpoint.total_bytes() == sum(sizes.values())
    assert _part(part, part.network).stored_bytes == sum(sizes.values())


def test_tensors_that_are_read_are_refused_before_any_is(tmp_path):
    folder = saved(sd3_factory.clip_encoder(8, 4, "gelu", False), tmp_path / "text_encoder")
    edit(folder, lambda t: t.update({"text_projection.weight": t["text_projection.weight"].long()}))
    part = open_part(folder, clip_text.MODEL)
    with pytest.raises(CheckpointError, match=r"text_projection.weight is stored as I64; expected one of F32"):
        part.load(CPU, torch.float32)
    assert part.checkpoint.meter.bytes_read == 0
