"""GGUF files: every type's values against the gguf package's, 4-bit blocks, names, shapes, and files that are wrong."""

from __future__ import annotations

import errno
import shutil
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import factory, gguf_factory, qwen_image_factory, sana_factory, sd3_factory
from twinflow_rt import errors
from twinflow_rt.checkpoint import gguf_file
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.gguf_file import GGUFFile
from twinflow_rt.errors import CheckpointError, ConfigError, OutOfMemoryError
from twinflow_rt.loading import load
from twinflow_rt.models.text_encoders import gemma2, qwen2_5_vl, qwen3, t5
from twinflow_rt.ops.int4 import Int4Form, dense, widen
from twinflow_rt.stages.stage import open_part

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
    with torch.inference_mode():  # which threads do not know of
        found = file.get_tensor("b")
    assert found.dtype == gguf_file.PLAIN.get(kind, torch.float32)
    assert file.get_slice("b").get_dtype() == (kind if kind in gguf_file.PLAIN else "BF16")
    assert file.get_slice("b").get_shape() == found.shape == (7, 512)
    assert torch.equal(found.float().view(torch.int32), expected.view(torch.int32))
    assert file.nbytes("b") == given[0].nbytes
    shared = found.data_ptr() == file.get_tensor("b").data_ptr()
    assert shared == (kind in gguf_file.PLAIN), "what is stored as such is a view of the mapped file"
    assert list(file.keys()) == ["a", "b"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_blocks_of_4_bits_keep_their_codes(tmp_path, kind):
    """What they stand for is the file's weight, but for the rounding of scales to float16; widened they fill int8."""
    given, expected = matrix(kind, (6, 512))
    given[0][2] = 0  # a row of nothing
    expected[2] = 0
    file = GGUFFile(gguf_factory.write(tmp_path / "x.gguf", {"a": given}))
    weight = file.get_int4("a")
    assert file.int4_form("a") == Int4Form(32, kind != "Q4_0")
    assert [w is None or (w.dtype, w.shape) for w in weight] == [
        (torch.uint8, (6, 256)), (torch.float16, (6, 16)), kind == "Q4_0" or (torch.float16, (6, 16)),
        (torch.float32, (6, 1)),
    ]  # fmt: skip
    # code * scale and minimum are each rounded once, by at most 2^-11 of what they are, which is at most twice the row
    bound = 4 * 2**-11 * 2 * weight.scales * 127
    assert ((dense(weight) - expected).abs() <= bound).all()
    assert (dense(weight) - expected).square().sum() < 1e-6 * expected.square().sum()
    assert widen(*weight[:3]).abs().amax() in range(64, 128)


def test_what_is_not_of_4_bits_has_no_codes(tmp_path):
    tensors = {kind: matrix(kind, (4, 256))[0] for kind in TYPES}
    tensors |= {"three axes": matrix("Q4_0", (2, 2, 64))[0], "half a chunk": matrix("Q4_0", (2, 96))[0]}
    file = GGUFFile(gguf_factory.write(tmp_path / "x.gguf", tensors))
    assert {name for name in tensors if file.int4_form(name) is not None} == {"Q4_0", "Q4_1", "Q4_K"}


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
    blocks = gguf.quantize(wide.view(3, 256).numpy(), gguf.GGMLQuantizationType.Q4_0)
    tensors = {"kernel": kernel, "model.wide": (blocks, "Q4_0"), "x_pad_token": pad}
    path = gguf_factory.write(
        tmp_path / "x.gguf", tensors, metadata=lambda w: w.add_array("comfy.gguf.orig_shape.model.wide", [6, 128])
    )
    file = GGUFFile(path)
    assert [file.get_slice(name).get_shape() for name in tensors] == [(2, 3, 1, 4, 4), (6, 128), (1, 48)]
    assert torch.equal(file.get_tensor("kernel"), kernel) and torch.equal(file.get_tensor("x_pad_token"), pad[None])
    assert (file.get_tensor("model.wide") - wide).abs().amax() < 0.5  # of the network's rows, so are its codes
    assert (dense(file.get_int4("model.wide")) - file.get_tensor("model.wide")).abs().amax() < 1e-3


# -- text encoders in llama.cpp's names, whatever the file says of its architecture ------------------------------------


def t5_whole():
    """Encoder, decoder and head."""
    from transformers import T5ForConditionalGeneration

    return T5ForConditionalGeneration(sd3_factory.t5_encoder().config)


def as_qwen2_5_vl(name):
    """The name that llama.cpp's converter looks up for one of the language model; "" for one that it leaves out."""
    return "" if "visual" in name else name.replace("model.language_model.", "model.")


# the package's name of the model, the network, ours, and the name that the converter looks up for a tensor
ENCODERS = {
    "QWEN3": (lambda: factory.text_encoder(head=True), qwen3.MODEL, str),
    "QWEN2VL": (qwen_image_factory.text_encoder, qwen2_5_vl.MODEL, as_qwen2_5_vl),
    "T5ENCODER": (sd3_factory.t5_encoder, t5.MODEL, str), "T5": (t5_whole, t5.MODEL, str),
    "GEMMA2": (lambda: sana_factory.text_encoder(head=True), gemma2.MODEL, str),
}  # fmt: skip


@pytest.mark.parametrize("model", ENCODERS)
def test_text_encoders_of_llama_cpp(tmp_path, model):
    """A folder with one in place of safetensors holds the same network; blocks are in files as in `tensors`."""
    make, architecture, looked_up = ENCODERS[model]
    network = factory.randomize(make(), 5)
    network.save_pretrained(tmp_path / "plain")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model], 4)
    tensors = {known.get_name(looked_up(name), (".weight", ".bias")): p for name, p in network.state_dict().items()}
    tensors.pop(None, None)
    if model == "GEMMA2":
        tensors = {name: p + 1 if name.endswith("norm.weight") else p for name, p in tensors.items()}
        tensors.pop("output.weight", None)  # tied
    folder = tmp_path / "gguf"
    folder.mkdir()
    shutil.copy(tmp_path / "plain" / "config.json", folder)
    gguf_factory.write(folder / "any-name_Q8_0.GGUF", tensors)
    parts = [open_part(at, architecture) for at in (tmp_path / "plain", folder)]
    for part in parts:
        part.load(torch.device("cpu"), torch.float32)
    expected, found = (part.network.state_dict() for part in parts)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-7 if model == "GEMMA2" else 0)


def test_a_llama_is_no_qwen(tmp_path):
    """Its names are Qwen's, but for those of norms and biases that it lacks."""
    network = factory.text_encoder(head=True)
    network.save_pretrained(tmp_path)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    tensors = {
        known.get_name(name, (".weight",)): p for name, p in network.state_dict().items() if "_norm." not in name
    }
    (tmp_path / "model.safetensors").unlink()
    gguf_factory.write(tmp_path / "x.gguf", tensors, architecture="qwen3")
    with pytest.raises(CheckpointError, match=r"missing layers.0.self_attn.k_norm.weight.*; another model"):
        open_part(tmp_path, qwen3.MODEL).load(torch.device("cpu"), torch.float32)


def test_a_folder_with_files_of_blocks_draws_what_their_numbers_draw(tmp_path):
    """Network and text encoder in GGUF, the one under diffusers' names, the other under llama.cpp's."""
    plain = factory.make_model(tmp_path / "plain", head=True)
    blocks = shutil.copytree(plain, tmp_path / "blocks")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 4)
    for part, file in (("transformer", factory.WEIGHTS), ("text_encoder", "model.safetensors")):
        tensors = load_file(blocks / part / file)
        (blocks / part / file).unlink()
        named = {known.get_name(n, (".weight",)) if part == "text_encoder" else n: t for n, t in tensors.items()}
        named |= {n: named[n][0] for n in named if n.endswith("pad_token")}  # as llama.cpp's tools do
        written = GGUFFile(gguf_factory.write(blocks / part / "x.gguf", named, "Q8_0"))
        read = {name: written.get_tensor(name) for name in written.keys()}  # noqa: SIM118 (not a dict)
        assert read.keys() == tensors.keys() and any(written.nbytes(name) < read[name].nbytes for name in read)
        save_file(read, plain / part / file)
    pictures = [load(at, device="cpu", precision="fp32")("a", seed=0, output="pt").images for at in (plain, blocks)]
    assert torch.equal(*pictures)


def test_the_dtype_to_compute_in_is_that_of_the_original(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    given = {"a": matrix("Q8_0", (64, 64))[0], "b": torch.ones(64)}
    gguf_factory.write(tmp_path / "x.gguf", given)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.main_dtype() == checkpoint.get("a").dtype == torch.bfloat16
    assert checkpoint.get("b").dtype == checkpoint.get("a", dtype=torch.float32).dtype == torch.float32
    assert checkpoint.total_bytes() == given["a"][0].nbytes + 256


# -- files that are wrong ------------------------------------------------------------------------


def text(content):
    return struct.pack("<Q", len(content)) + content


def value(key, kind, payload):
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name=b"a", dims=(32,), kind=0, offset=0, axes=None):
    axes = len(dims) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", axes, *dims, kind, offset)


TENSOR = tensor()


def written(tensors=(TENSOR,), values=(), version=3, counts=None, data=bytes(128), alignment=32):
    header = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(values))))
    header += b"".join((*values, *tensors))
    return header + bytes(-len(header) % alignment) + data


ALIGNMENT, SPLIT, SHAPE = b"general.alignment", b"split.count", b"comfy.gguf.orig_shape.a"
BAD = {
    "empty": (b"", "truncated or no GGUF file"),
    "three bytes": (b"GGU", r"truncated or no GGUF file \(it ends within its header\)"),
    "another kind": (bytes(100), "it does not begin as one"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "a page": (b"<!doctype html>", "is a web page"),
    "version 1": (written(version=1), "is GGUF of version 1; versions 2 and 3 are read: get a newer file"),
    "version 0": (written(version=0), "is GGUF of version 0"),
    "2^31 tensors": (written(counts=(2**31, 0)), "claims 2,147,483,648 tensors and 0 values; none has more than 100"),
    "2^64 - 1 values": (written(counts=(1, 2**64 - 1)), "claims 1 tensors and 18,446,744,073,709,551,615 values"),
    "tensors that are not there": (written(counts=(3, 0), data=b""), "ends within its header"),
    "a part": (written(values=[value(SPLIT, 2, struct.pack("<H", 3))]), "is one of 3 parts; join them with `llama-"),
    "alignment 3": (written(values=[value(ALIGNMENT, 4, struct.pack("<I", 3))]), "its alignment is 3"),
    "alignment of text": (written(values=[value(ALIGNMENT, 8, text(b"32"))]), "its alignment is 0"),
    "a value of no type": (written(values=[value(b"k", 13, b"")]), "it has 1 values of type 13"),
    "arrays of arrays": (written(values=[value(b"k", 9, struct.pack("<IQ", 9, 1))]), "it has 1 values of type 9"),
    "2^62 numbers": (written(values=[value(b"k", 9, struct.pack("<IQ", 0, 2**62))]), "has 4,611,686,018,427,387,904"),
    "2^62 texts": (written(values=[value(b"k", 9, struct.pack("<IQ", 8, 2**62))]), "has 4,611,686,018,427,387,904"),
    "a text of 2^63": (written(values=[value(b"k", 8, struct.pack("<Q", 2**63))]), "truncated or no GGUF file"),
    "a name of no text": (written([tensor(b"\xff")]), "no GGUF file .*utf-8"),
    "a name twice": (written([tensor(), tensor()]), "a stands twice"),
    "2^32 - 1 axes": (written([tensor(axes=2**32 - 1)]), "has 4,294,967,295 axes"),
    "an axis of 0": (written([tensor(dims=(32, 0))]), r"a has shape \(0, 32\)"),
    "2^80 numbers": (written([tensor(dims=(2**40, 2**40))]), "a has bytes 96 to 4,835,703,278,[0-9,]*800 of 224"),
    "rows that no blocks make": (written([tensor(dims=(48, 2), kind=2)]), r"shape \(2, 48\).*Q4_0 in blocks of 32"),
    "a type that is gone": (written([tensor(kind=4)]), "a is of type 4, which the installed gguf package does not"),
    "a type to come": (written([tensor(kind=2**31)]), "type 2147483648, .*Q4_K or Q8_0, or a newer package: pip"),
    "a type of integers": (written([tensor(kind=26)]), "a is of type 26, which"),
    "a type for products only": (written([tensor(dims=(256,), kind=15)]), "a is of type 15, which"),
    "data cut": (written(data=bytes(127)), "a has bytes 64 to 192 of 191"),
    "data of an offset beyond": (written([tensor(offset=2**63)]), "a has bytes"),
    "data at an odd byte": (written([tensor(dims=(1,), offset=1)]), "a has bytes 65 to 69 of 192"),
    "another shape of ComfyUI": (
        written(values=[value(SHAPE, 9, struct.pack("<IQii", 5, 2, 4, 9))]), r"a has shape \(32,\) or \(4, 9\)"
    ),
    "a negative shape": (
        written(values=[value(SHAPE, 9, struct.pack("<IQii", 5, 2, -4, -8))]), r"a has shape \(32,\) or \(-4, -8\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)


def test_what_bad_files_are_made_of_is_good(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(
        written(
            [tensor(b"b", (2, 2, 2), offset=64), tensor(), tensor(b"a number", (), offset=8)],
            [
                value(ALIGNMENT, 4, struct.pack("<I", 64)),
                value(b"k", 9, struct.pack("<IQ", 8, 2) + text(b"x") + text(b"")),
            ],
            data=struct.pack("<32f", *range(32)),
            version=2,
            alignment=64,
        )
    )
    file = GGUFFile(path)
    assert file.get_tensor("b").tolist() == torch.arange(16.0, 24.0).view(2, 2, 2).tolist()
    assert torch.equal(file.get_tensor("a"), torch.arange(32.0))
    assert torch.equal(file.get_tensor("a number"), torch.tensor(2.0))


def test_big_endian_files(tmp_path):
    path = gguf_factory.write(tmp_path / "x.gguf", {"a": torch.ones(2)}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match=r"is big-endian; convert it with `gguf-convert-endian \S+x.gguf little`"):
        GGUFFile(path)


def test_an_address_space_that_is_full(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(gguf_file, "mmap", full)
    path = gguf_factory.write(tmp_path / "x.gguf", {"a": torch.ones(2)})
    with pytest.raises(OutOfMemoryError, match=r"x.gguf cannot be mapped; free memory, or raise `ulimit -v`"):
        GGUFFile(path)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"reading GGUF files needs gguf: pip install '\.\[gguf\]'"):
        GGUFFile(tmp_path / "x.gguf")
