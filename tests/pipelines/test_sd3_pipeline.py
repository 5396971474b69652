"""What SD3.5 alone has: two CLIP towers and a T5 that may be absent, adapters of both time embedders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import WEIGHTS
from tests.networks import relative
from tests.pipelines.references import MODELS, PROMPTS, open_reference
from twinflow_rt.errors import CheckpointError
from twinflow_rt.loading import load

NAMES = {True: "sd3", False: "sd3-without-t5"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """With T5 and without."""
    folder = tmp_path_factory.mktemp("sd3")
    return {with_t5: MODELS[name].make(folder / name) for with_t5, name in NAMES.items()}


@torch.no_grad()
def test_prompt_embeddings_equal_diffusers(models):
    """CLIP's tokens, then T5's or zeros; prompts longer than the encoders' limits lose their tail."""
    prompts = [*PROMPTS, "z " * 300]
    for with_t5 in (True, False):
        peer = open_reference(NAMES[with_t5], models[with_t5])
        embeds, _, pooled, _ = peer.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
        ours = load(models[with_t5], device="cpu").text(prompts)
        assert ours.embeds.shape == (4, 12 + 256, 20) and ours.lengths == (268,) * 4
        assert relative(ours.embeds, embeds) < 1e-5 and relative(ours.extras["pooled"], pooled) < 1e-5
        assert with_t5 == bool(ours.embeds[:, 12:].any())


def test_a_lora_of_twinflows_targets_is_merged_before_folding(models, tmp_path):
    """TwinFlow's adapters for SD3.5 touch attention and both time embedders, of which folding leaves a table."""
    generator = torch.Generator().manual_seed(0)
    folder = shutil.copytree(models[False], tmp_path / "merged")
    file = folder / "transformer" / WEIGHTS
    tensors, factors = load_file(file), {}
    targets = [f"{e}.timestep_embedder.linear_{i}" for e in ("time_text_embed", "time_text_embed_2") for i in (1, 2)]
    for module in (*targets, "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_add_out"):
        weight = tensors[f"{module}.weight"]
        a, b = torch.randn(2, weight.shape[1], generator=generator), torch.randn(len(weight), 2, generator=generator)
        factors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
        tensors[f"{module}.weight"] = weight + 0.1 * b @ a
    save_file(tensors, file, metadata={"format": "pt"})
    save_file(factors, tmp_path / "lora.safetensors")
    args = {"height": 16, "width": 16, "seed": 1, "output": "latent"}
    base, merged = (load(model, device="cpu")("x", **args).images for model in (models[False], folder))
    ours = load(models[False], device="cpu", loras={tmp_path / "lora.safetensors": 0.1})("x", **args).images
    assert relative(ours, merged) < 1e-5 and relative(base, merged) > 1e-2


def test_skipping_t5_is_said_not_guessed(models, tmp_path):
    """A missing folder is an error; model_index.json says when T5 is to be left out, as diffusers writes it."""
    folder = tmp_path / "m"
    shutil.copytree(models[True], folder)
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(CheckpointError, match="text_encoder_3"):
        load(folder, device="cpu")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "text_encoder_3": [None, None]}))
    args = {"height": 16, "width": 16, "seed": 1, "output": "latent"}
    expected = load(models[False], device="cpu")(PROMPTS, **args).images
    assert torch.equal(load(folder, device="cpu")(PROMPTS, **args).images, expected)
