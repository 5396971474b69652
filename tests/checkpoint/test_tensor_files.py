"""Which files of a folder are opened: whole, sharded, and in the variants that diffusers and transformers save."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.factory import text_encoder, transformer
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.errors import CheckpointError

TENSORS = {"a": torch.ones(4), "b": torch.ones(2, 3)}
PLAIN, USUAL = "diffusion_pytorch_model", "model"


def single(folder, name, value):
    save_file({key: tensor * value for key, tensor in TENSORS.items()}, folder / f"{name}.safetensors")


def sharded(folder, index, shard, value):
    """Two shards, named by `shard` with their number in it, and their index."""
    weight_map = {key: shard.format(i + 1) for i, key in enumerate(TENSORS)}
    for key, name in weight_map.items():
        save_file({key: TENSORS[key] * value}, folder / name)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))


def read(folder):
    """The value that was saved, of every tensor."""
    checkpoint = Checkpoint(folder, config={})
    assert set(checkpoint) == set(TENSORS)
    values = {checkpoint.get(name).unique().item() for name in checkpoint}
    assert len(values) == 1
    return values.pop()


@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
@pytest.mark.parametrize("of", ["diffusers", "transformers"])
def test_sharded_variants_as_the_libraries_save_them(tmp_path, of, variant):
    network = transformer() if of == "diffusers" else text_encoder()
    network.save_pretrained(tmp_path, variant=variant, max_shard_size="40KB")
    assert len([*tmp_path.glob(f"*.{variant}-00001-of-*.safetensors")]) == 1
    checkpoint = Checkpoint(tmp_path)
    saved = network.state_dict()
    assert set(checkpoint) == set(saved) and all(torch.equal(checkpoint.get(k), v) for k, v in saved.items())


INDICES = [
    ("model.safetensors.index.bf16.json", "model.bf16-{:05d}-of-00002.safetensors"),
    (f"{PLAIN}.safetensors.index.fp16.json", PLAIN + ".fp16-{:05d}-of-00002.safetensors"),
    (f"{PLAIN}.fp16.safetensors.index.json", PLAIN + "-{:05d}-of-00002.fp16.safetensors"),
    (f"{PLAIN}.safetensors.fp16.index.json", PLAIN + "-{:05d}-of-00002.fp16.safetensors"),
]


@pytest.mark.parametrize(("index", "shard"), INDICES)
def test_variants_alone_and_beside_plain_weights(tmp_path, index, shard):
    sharded(tmp_path, index, shard, 2)
    assert read(tmp_path) == 2
    stem = index.partition(".")[0]
    single(tmp_path, stem, 3)
    assert read(tmp_path) == 3
    sharded(tmp_path, f"{stem}.safetensors.index.json", stem + "-{:05d}-of-00002.safetensors", 4)
    assert read(tmp_path) == 4


def test_an_index_whose_shards_were_not_downloaded_gives_way_to_a_variant(tmp_path):
    sharded(tmp_path, "model.safetensors.index.json", "model-{:05d}-of-00002.safetensors", 1)
    for path in tmp_path.glob("model-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-00002.safetensors is missing"):
        read(tmp_path)
    sharded(tmp_path, "model.safetensors.index.bf16.json", "model.bf16-{:05d}-of-00002.safetensors", 2)
    assert read(tmp_path) == 2


def two_variants(folder):
    single(folder, "model.fp16", 1)
    sharded(folder, "model.safetensors.index.bf16.json", "model.bf16-{:05d}-of-00002.safetensors", 2)


def without_index(folder):
    sharded(folder, "x.json", "model-{:05d}-of-00002.safetensors", 2)
    (folder / "x.json").unlink()


REFUSED = [
    (two_variants, r"several weight files \(model.safetensors.index.bf16.json, model.fp16.safetensors\).*keep one"),
    (without_index, r"shards \(model-00001-of-00002.safetensors.*without their index; download"),
    (lambda folder: [(folder / x).touch() for x in ("a.gguf", "B.GGUF")], r"several .* \(B.GGUF, a.gguf\); keep one"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_folders_without_weights_to_choose(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path)
    assert not re.search("truncated", str(caught.value))
