"""Weights stored in 8 bits, in every layout that tools write, against float64; and what is refused, by its name."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import WEIGHTS, make_z_image, shard
from tests.fuzz.mutate import NASTY
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.errors import CheckpointError
from twinflow_rt.loading import load

F8, E5M2, HALF, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16
N, K = 72, 160


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(dtype, columns=K):
    return (draw(N, columns) * 40).round().clamp(-127, 127).to(dtype)


def scales(*shape, dtype=torch.float32):
    return (draw(*shape, seed=1).abs() / 50 + 0.01).to(dtype)


def spread(factors, rows=1, columns=1):
    """Factors of blocks, one for each number of the weight, in float64."""
    return factors.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:N, :K]


def mark(**content):
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def header(**layers):
    return {"_quantization_metadata": json.dumps({"layers": layers})}


def save(tensors, folder, metadata):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata=metadata)


W8, WF, W5 = codes(torch.int8), codes(F8), codes(E5M2)
ZERO = torch.arange(N, dtype=torch.int8)[:, None]
ROW, ROW16, ONE, BLOCK = scales(N, 1), scales(N, 1, dtype=BF16), scales(1), scales(2, 2)  # blocks of 64 x 128
GROUP = scales(N, 5)  # of 32
H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
ROTATED = mark(format="int8_tensorwise", convrot=True, convrot_groupsize=16)
UNROTATED = (W8 * ROW.double()).unflatten(1, (-1, 16)) @ torch.kron(H4, H4)
FP8 = {"format": "float8_e4m3fn"}
# tensors, header, the weight they stand for, the dtype that it is best held in
LAYOUTS = {
    "fp8 as it is": ({"a.weight": WF}, {}, WF.double(), BF16),
    "e5m2 as it is": ({"a.weight": W5}, {}, W5.double(), BF16),
    "ComfyUI's former scaled fp8": (
        {"a.weight": WF, "a.scale_weight": ONE, "a.scale_input": ONE, "scaled_fp8": torch.ones(2).to(F8)},
        {}, WF.double() * ONE.double(), BF16,
    ),
    "ComfyUI's, in an encoder": (
        {"t.a.weight": WF, "t.a.scale_weight": ONE[0], "t.scaled_fp8": torch.ones(0).to(F8)}, {},
        WF.double() * ONE.double(), BF16,
    ),
    "ComfyUI's header": ({"a.weight": WF, "a.weight_scale": ONE, "a.input_scale": ONE}, header(a=FP8),
                         WF.double() * ONE.double(), BF16),
    "ComfyUI's int8 by rows": ({"a.weight": W8, "a.weight_scale": ROW, "a.comfy_quant": mark(format="int8_tensorwise")},
                               {}, W8 * ROW.double(), BF16),
    "ComfyUI's blocks": ({"a.weight": WF, "a.weight_scale": BLOCK},
                         header(a={"format": "float8_e4m3fn_blockwise", "params": {"group_size": 64}}),
                         WF.double() * spread(BLOCK, 64, 128), BF16),
    "ComfyUI's rotated": ({"a.weight": W8, "a.weight_scale": ROW, "a.comfy_quant": ROTATED}, {}, UNROTATED.flatten(1),
                          BF16),
    "rotated, by a header without prefix": (
        {"p.a.weight": W8, "p.a.weight_scale": ROW},
        header(a={"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 16}}),
        UNROTATED.flatten(1), BF16,
    ),
    "quanto": ({"a.weight._data": W8, "a.weight._scale": ROW16, "a.input_scale": ONE, "a.output_scale": ONE}, {},
               W8 * ROW16.double(), BF16),
    "quanto of float16": ({"a.weight._data": W8, "a.weight._scale": ROW.half()}, {}, W8 * ROW.half().double(), HALF),
    "torchao": ({"a._weight_qdata": W8, "a._weight_scale": ROW, "a._weight_zero_point": ZERO},
                {"a.weight": '{"_type": "Int8Tensor"}', "tensor_names": '["a.weight"]'},
                (W8.double() - ZERO) * ROW.double(), BF16),
    "compressed-tensors, by group": ({"a.weight": W8, "a.weight_scale": GROUP, "a.weight_zero_point": GROUP.char()},
                                     {}, W8 * spread(GROUP, 1, 32), BF16),
    "a scale for each row, flat": ({"a.weight": WF, "a.weight_scale": ROW[:, 0]}, {}, WF.double() * ROW.double(), BF16),
    "fine-grained fp8": ({"a.weight": WF, "a.weight_scale_inv": scales(1, 2)}, {},
                         WF.double() * spread(scales(1, 2), 128, 128), BF16),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    tensors, metadata, expected, best = LAYOUTS[layout]
    others = {"a.bias": torch.ones(N, dtype=BF16), "logit_scale": torch.ones(())}
    save({**tensors, **others}, tmp_path, metadata)
    checkpoint = Checkpoint(tmp_path, config={}, strip=("p.", "t."))
    assert {*checkpoint} == {"a.weight", "a.bias", "logit_scale"}
    assert checkpoint.shape("a.weight") == (N, K) and checkpoint.dtype("a.weight") == best
    dense = checkpoint.get("a.weight", dtype=torch.float32)
    assert (dense.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert checkpoint.get("a.weight").dtype == best
    unread = ("put_scale", "scale_input", "comfy_quant", "scaled_fp8")
    assert checkpoint.nbytes("a.weight") == sum(t.nbytes for name, t in tensors.items() if not name.endswith(unread))


def damaged(value):
    return torch.where(torch.arange(N)[:, None] == 7, torch.tensor(value), ROW)


S = "a.weight_scale"
REFUSED = {
    "no scale": ({"a.weight": W8}, {}, r"is stored as I8 without its scale \(a.weight_scale\).*download"),
    "lost": ({"l.0.a.weight": WF, "l.0.a.scale_weight": ONE, "l.1.a.weight": WF}, {},
             "l.1.a.weight is stored as F8_E4M3 without"),
    "said to be scaled": ({"a.weight": WF}, header(a=FP8), "a.weight is stored as F8_E4M3 without"),
    "seven rows": ({"a.weight": W8, S: scales(7)}, {}, r"has shape \[7\], but a.weight of \[72, 160\] needs one"),
    "columns": ({"a.weight": W8, S: scales(K)}, {}, r"has shape \[160\]"),
    "no scales at all": ({"a.weight": W8, S: scales(0)}, {}, r"has shape \[0\]"),
    "axes": ({"a.weight": W8, S: scales(N, 1, 2)}, {}, r"has shape \[72, 1, 2\]"),
    "zero point": ({"a.weight": W8, S: ROW, "a.weight_zero_point": ZERO[:7]}, {}, r"zero_point has shape \[7, 1\]"),
    "NaN": ({"a.weight": W8, S: damaged(float("nan"))}, {}, "a.weight_scale holds NaN or infinity"),
    "infinity": ({"a.weight": W8, S: damaged(float("inf"))}, {}, "a.weight_scale holds NaN or infinity"),
    "no JSON": ({"a.weight": W8, S: ROW}, {"_quantization_metadata": "{"}, "says of its quantization is not readable"),
    "a list": ({"a.weight": W8, S: ROW}, {"_quantization_metadata": "[]"}, "says of its quantization is not readable"),
    "a number": ({"a.weight": W8, S: ROW, "a.comfy_quant": mark()[:0]}, {}, "says of its quantization is not readable"),
    "a turn": ({"a.weight": W8, S: ROW}, header(a={"format": "int8_tensorwise", "convrot": True}), "rotation of 256"),
    "mxfp8": ({"a.weight": WF, S: torch.ones(N, 5, dtype=torch.uint8)}, {}, r"F8_E4M3 and U8 .*, as mxfp8"),
    "w4a4": ({"a.weight": W8, S: ROW}, header(a="convrot_w4a4"), r"quantized by ComfyUI \(convrot_w4a4\)"),
    "nvfp4": ({"a.weight": W8.byte(), S: WF, "a.weight_scale_2": ONE}, {}, "a.weight_scale_2 is quantized by nvfp4"),
    "packed": ({"a.weight": W8.byte(), S: ROW}, {}, "quantized by a method with U8"),
    "SDNQ": ({"a.weight": W8, "a.scale": ROW}, {}, "quantized by a method with I8 .*as mxfp8 or SDNQ"),
    "nunchaku": ({"a.qweight": W8, "a.wscales": ROW}, {}, "quantized by nunchaku"),
    "bitsandbytes": ({"a.weight": W8, "a.SCB": ROW}, {}, "quantized by bitsandbytes"),
    "bitsandbytes in 4 bits": ({"a.weight": W8.byte(), "a.weight.absmax": ROW}, {}, "quantized by bitsandbytes"),
    "GPTQ": ({"a.qweight": W8.int(), "a.qzeros": ZERO.int(), "a.scales": ROW}, {}, "quantized by GPTQ or AWQ"),
    "compressed": ({"a.weight_packed": W8.int(), S: ROW}, {}, "quantized by compressed-tensors in 4 bits"),
    "quanto": ({"a.weight._data._data": W8.byte(), "a.weight._scale": ROW, "a.weight._shift": ROW}, {}, "quanto in 4"),
    "torchao": ({"a._weight_qdata": W8, "a._weight_scale": ROW}, {"a.weight": '{"_type": "Int4Tensor"}'}, "Int4Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path, case):
    tensors, metadata, message = REFUSED[case]
    save(tensors, tmp_path, metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(tmp_path, config={}).get("a.weight")
    assert "download" in str(caught.value) or "as GGUF" in str(caught.value)


def test_convolutions_and_numbers_without_scales_between_them(tmp_path):
    kernel = torch.ones(4, 3, 2, 2).to(F8)
    per_row = scales(4)
    save_file(
        {"a.weight": kernel, "a.weight_scale": per_row, "b": torch.ones(4, dtype=torch.int64)}, tmp_path / WEIGHTS
    )
    checkpoint = Checkpoint(tmp_path, config={})
    assert torch.equal(checkpoint.get("a.weight", dtype=torch.float32), per_row.view(4, 1, 1, 1).expand(4, 3, 2, 2))
    with pytest.raises(CheckpointError, match="b is stored as I64"):
        checkpoint.dtype("b")


LEAVES = (
    "weight", "weight_scale", "weight_scale_inv", "scale_weight", "weight_zero_point", "weight._data", "weight._scale",
    "_weight_qdata", "_weight_scale", "comfy_quant", "input_scale", "bias", "scale",
)  # fmt: skip
SHAPES = ((), (0,), (1,), (4,), (16,), (4, 16), (16, 4), (4, 1), (1, 16), (0, 16), (4, 2), (4, 16, 1, 1), (2, 2, 2))
KINDS = (torch.int8, F8, E5M2, torch.uint8, torch.float32, HALF, torch.int64)


def strange(seed):
    """A small file of such names, dtypes, shapes and descriptions as quantized ones have, put together at random."""
    pick = random.Random(seed).choice
    names = {f"{pick('abl')}{pick(('', '.0', '.1'))}.{pick(LEAVES)}" for _ in range(pick(range(1, 9)))}
    tensors = {name: torch.ones(pick(SHAPES)).to(pick(KINDS)) for name in sorted(names)}
    said = {"format": pick(("int8_tensorwise", "float8_e4m3fn", *NASTY)), "convrot": pick(NASTY)}
    said |= {"convrot_groupsize": pick((16, *NASTY))} if pick((0, 1)) else {"params": pick(NASTY)}
    layers = pick(({"a": said}, {"a": said}, {"": said}, {"a.0": pick(NASTY)}, *NASTY))
    return tensors, pick((header(), {"_quantization_metadata": json.dumps(pick(({"layers": layers}, *NASTY)))}))


def test_strange_files_are_read_or_refused(tmp_path):
    answers = set()
    for seed in range(200):
        tensors, metadata = strange(seed)
        save(tensors, tmp_path, metadata)
        try:
            checkpoint = Checkpoint(tmp_path, config={})
            for name in checkpoint:
                assert checkpoint.get(name).shape == checkpoint.shape(name)
            answers.add("read")
        except CheckpointError as error:
            answers.add(str(error).partition(": ")[2][:12])
    assert "read" in answers and len(answers) > 10


def quantized(tensors):
    """A network's tensors with matrices in int8 by row, each scale in another shard, and what those stand for."""
    stored, dense = {}, {}
    for name, tensor in tensors.items():
        dense[name] = stored[name] = tensor
        if tensor.ndim == 2 and "layers" in name:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            stored[name], stored[f"{name}_scale"] = (tensor / scale).round().char(), scale
            dense[name] = stored[name] * scale
    return stored, dense


def test_a_model_of_shards_draws_what_its_dense_weights_draw(tmp_path):
    model = make_z_image(tmp_path / "model") / "transformer"
    stored, dense = quantized(load_file(model / WEIGHTS))
    save_file(dense, model / WEIGHTS)
    asked = {"seed": 1, "height": 32, "width": 32, "output": "latent"}
    expected = load(model.parent, device="cpu", precision="fp32")("a", **asked).images
    save_file(stored, model / WEIGHTS)
    shard(model)
    config = json.loads((model / "config.json").read_text())
    method = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (model / "config.json").write_text(json.dumps({**config, **method}))
    images = load(model.parent, device="cpu", precision="fp32")("a", **asked).images
    assert (images - expected).abs().max() <= 1e-5 * expected.abs().max()
