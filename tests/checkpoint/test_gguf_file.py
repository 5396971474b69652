"""GGUF files: every type's values against the gguf package's, 4-bit blocks, names, shapes, and files that are wrong."""

from __future__ import annotations

import json
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import factory, gguf_factory, sana_factory, sd3_factory
from twinflow_rt.checkpoint import gguf_file
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.gguf_file import GGUFFile
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.ops.int4 import dense, widen

TYPES = (*gguf_factory.HALVES, "F32", "F16", "BF16")


def matrix(kind, shape, seed=0):
    """Data of a type, and the numbers that they are by the package."""
    of = gguf.GGMLQuantizationType[kind]
    if kind in gguf_factory.HALVES:
        data = gguf_factory.blocks(kind, shape, seed)
    else:
        data = gguf.quantize(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), of)
    return (data, kind), torch.from_numpy(gguf.dequantize(data, of))


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_the_packages_bit_for_bit(tmp_path, monkeypatch, kind):
    """Also where threads share a tensor, the last with less than the others."""
    monkeypatch.setattr(gguf_file, "AT_ONCE", 1024)
    given, expected = matrix(kind, (7, 512))
    file = GGUFFile(gguf_factory.write(tmp_path / "x.gguf", {"a": given, "b": given}))
    found = file.get_tensor("b")
    assert found.dtype == gguf_file.PLAIN.get(kind, torch.float32)
    assert file.get_slice("b").get_dtype() == (kind if kind in gguf_file.PLAIN else "BF16")
    assert file.get_slice("b").get_shape() == found.shape == (7, 512)
    assert torch.equal(found.float().view(torch.int32), expected.view(torch.int32))
    assert file.nbytes("b") == given[0].nbytes
    assert list(file.keys()) == ["a", "b"]


@pytest.mark.parametrize("limit", [127.0, 63.0])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_blocks_of_4_bits_keep_their_codes(tmp_path, kind, limit):
    """What they stand for is the file's weight, but for the rounding of scales to float16; widened they fill int8."""
    given, expected = matrix(kind, (6, 512))
    given[0][2] = 0  # a row of nothing
    expected[2] = 0
    file = GGUFFile(gguf_factory.write(tmp_path / "x.gguf", {"a": given}))
    weight = file.get_int4("a", limit)
    assert [w is None or (w.dtype, w.shape) for w in weight] == [
        (torch.uint8, (6, 256)), (torch.float16, (6, 16)), kind == "Q4_0" or (torch.float16, (6, 16)),
        (torch.float32, (6, 1)),
    ]  # fmt: skip
    # code * scale and minimum are each rounded once, by at most 2^-11 of what they are, which is at most twice the row
    bound = 4 * 2**-11 * 2 * weight.scales * limit
    assert ((dense(weight) - expected).abs() <= bound).all()
    assert (dense(weight) - expected).square().sum() < 1e-6 * expected.square().sum()
    assert widen(*weight[:3]).abs().amax() in range(int(limit) // 2, int(limit) + 1)


def test_what_is_not_of_4_bits_has_no_codes(tmp_path):
    tensors = {kind: matrix(kind, (4, 256))[0] for kind in TYPES}
    tensors |= {"three axes": matrix("Q4_0", (2, 2, 64))[0], "half a chunk": matrix("Q4_0", (2, 96))[0]}
    file = GGUFFile(gguf_factory.write(tmp_path / "x.gguf", tensors))
    assert {name for name in tensors if file.get_int4(name) is not None} == {"Q4_0", "Q4_1", "Q4_K"}


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "Q4_K"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(tmp_path, kind, value):
    data = gguf_factory.blocks(kind, (4, 256))
    at = gguf_factory.HALVES[kind][-1]
    data[1, at : at + 2] = np.array([value], np.float16).view(np.uint8)
    file = GGUFFile(gguf_factory.write(tmp_path / "x.gguf", {"a": (data, kind)}))
    for read in (file.get_tensor, file.get_int4)[: 2 - (kind == "Q6_K")]:
        with pytest.raises(CheckpointError, match=r"x.gguf: a has scales of NaN or infinity; download"):
            read("a")


def test_shapes(tmp_path):
    """Five axes; ComfyUI's rows of 256; the first axis that llama.cpp's tools drop from pad tokens."""
    kernel, wide, pad = torch.randn(2, 3, 1, 4, 4), torch.randn(6, 128), torch.randn(48)
    tensors = {"kernel": kernel, "model.wide": (gguf.quantize(wide.view(3, 256).numpy(), 2), "Q4_0"), "x_pad_token": pad}
    path = gguf_factory.write(
        tmp_path / "x.gguf", tensors, metadata=lambda w: w.add_array("comfy.gguf.orig_shape.model.wide", [6, 128])
    )
    file = GGUFFile(path)
    assert [file.get_slice(name).get_shape() for name in tensors] == [(2, 3, 1, 4, 4), (6, 128), (1, 48)]
    assert torch.equal(file.get_tensor("kernel"), kernel) and torch.equal(file.get_tensor("x_pad_token"), pad[None])
    assert file.get_tensor("model.wide").shape == (6, 128) and file.get_int4("model.wide") is None
    assert (file.get_tensor("model.wide") - wide).abs().amax() < 0.5


# -- text encoders in llama.cpp's names -------------------------------------------------------------


def to_llama_cpp(tensors, model, layers):
    """Tensors under the names that llama.cpp's converter gives them, by the package."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model], layers)
    names = {name: known.get_name(name, (".weight", ".bias")) for name in tensors}
    return {new: tensors[name] for name, new in names.items() if new is not None}


def text_models(name):
    """A text encoder, its llama.cpp name, and what its converter does to its tensors."""
    if name == "QWEN3":
        return factory.text_encoder(head=True), "QWEN3", {}
    if name == "QWEN2VL":
        from tests.qwen_image_factory import text_encoder

        return text_encoder(), "QWEN2VL", {}
    if name == "T5":
        return sd3_factory.t5(), "T5ENCODER", {}
    return sana_factory.text_encoder(), "GEMMA2", {}
