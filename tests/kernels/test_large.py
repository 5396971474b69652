"""Offsets beyond 2^31 elements: the last program of a launch over memory that is reserved but never filled.

Only the pages that this program touches exist, so a launch over 2^31 elements takes milliseconds. An
offset computed in 32 bits would wrap, and read or write elsewhere.
"""

from __future__ import annotations

import inspect
import mmap
from math import prod

import pytest
import torch
from oracle import draw

from twinflow_rt import ops
from twinflow_rt.kernels import attention, decode, int4, launch, linear, mlp, norm, rope, sample
from twinflow_rt.ops.int4 import quantize_int4

EPS = 1e-5
HALF = torch.bfloat16
BEYOND = 2**31


def reserve(*shape: int, dtype: torch.dtype = torch.float32, device=None) -> torch.Tensor:
    """Zeros that take no memory until they are written."""
    shape = shape[0] if shape and not isinstance(shape[0], int) else shape
    pages = mmap.mmap(-1, max(prod(shape), 1) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    return torch.frombuffer(pages, dtype=dtype, count=prod(shape)).view(shape)


@pytest.fixture(autouse=True)
def last_program(monkeypatch, interpreted):
    from triton.runtime import interpreter

    def run(self, *args, **options):
        options = {name: value for name, value in options.items() if name in self.arg_names}
        values = inspect.getcallargs(self.fn, *args, **options)
        values = {n: v if n in self.constexprs else interpreter._implicit_cvt(v) for n, v in values.items()}
        grid = (*self.grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        interpreter.interpreter_builder.set_grid_idx(*(n - 1 for n in grid))
        self.fn(**values)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)
    monkeypatch.setattr(torch, "empty", reserve)


def rows(width: int, seed: int = 0, dtype: torch.dtype = HALF) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, S, width] of more than 2^31 elements, and its last row, the only one that is not zero."""
    x = reserve(1, BEYOND // width + 1, width, dtype=dtype)
    x[:, -1:] = draw(1, 1, width, seed=seed)
    return x, x[:, -1:].clone()


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.float().abs().max() > 0.1
    torch.testing.assert_close(got.float(), wanted.float(), rtol=0.02, atol=0.02)


def test_norms():
    (x, x_row), (y, y_row), w = rows(4096), rows(4096, 1), draw(4096, seed=2)
    same(norm.rms_norm(x, w, EPS)[:, -1:], ops.rms_norm(x_row, w, EPS))
    same(norm.layer_norm(x, w, EPS, w)[:, -1:], ops.layer_norm(x_row, w, EPS, w))
    for got, wanted in (
        (norm.residual_norm(x, y, w, w, EPS), ops.residual_norm(x_row, y_row, w, w, EPS)),
        (norm.residual_layer_norm(x, y, w.view(1, 1, -1), None, None, EPS),
         ops.residual_layer_norm(x_row, y_row, w.view(1, 1, -1), None, None, EPS)),
    ):  # fmt: skip
        for a, b in zip(got, wanted, strict=True):
            same(a[:, -1:], b)


def test_quantized():
    (x, x_row), w = rows(4096), draw(4096, seed=2)
    for got, wanted in (
        (norm.rms_norm_quantized(x, w, EPS, torch.int8), ops.rms_norm_quantized(x_row, w, EPS, torch.int8)),
        (mlp.gelu_tanh_quantized(x, torch.int8), ops.gelu_tanh_quantized(x_row, torch.int8)),
        (linear.quantize_rows(x, torch.int8), ops.quantize_rows(x_row, torch.int8)),
    ):
        same(got[0][:, -1:] * got[1][:, -1:], wanted[0] * wanted[1])
    total, values, scales = norm.residual_norm_quantized(x, x, w, w, EPS, torch.int8)
    wanted = ops.residual_norm_quantized(x_row, x_row, w, w, EPS, torch.int8)
    same(total[:, -1:], wanted[0])
    same(values[:, -1:] * scales[:, -1:], wanted[1] * wanted[2])


@pytest.mark.parametrize("op", ["swiglu", "gelu_tanh"])
def test_activations(op):
    x, row = rows(8192)
    got, wanted = getattr(mlp, op)(x)[:, -1:], getattr(ops, op)(row)
    same(got[..., -512:], wanted[..., -512:])  # the last program's piece of the row


def test_linear_swiglu():
    (x, row), weight = rows(4096), reserve(8192, 4096, dtype=HALF)
    weight[4032:4096], weight[8128:] = draw(64, 4096) / 64, draw(64, 4096, seed=1) / 64  # the last tile of each half
    same(mlp.linear_swiglu(x, weight)[:, -1:, -64:], ops.linear_swiglu(row, weight)[..., -64:])


def test_products_of_4_bits():
    (x, row), weight = rows(4096), quantize_int4(draw(96, 4096) / 64, 64)
    same(int4.linear_w4a16(x, *weight, None)[:, -1:, -32:], ops.linear_w4a16(row, *weight, None)[..., -32:])
    # as many outputs, of which the last tile's are not zero
    packed, groups, scales = (
        reserve(BEYOND // 64, *size, dtype=dtype)
        for size, dtype in (((64,), torch.uint8), ((2,), torch.float16), ((1,), torch.float32))
    )
    for whole, part in ((packed, weight.packed[:, :64]), (groups, weight.group_scales[:, :2]), (scales, weight.scales)):
        whole[-96:] = part
    values, x_scales = ops.quantize_rows(row[0, :, :128], torch.int8)
    got = int4.linear_w4a8(values, x_scales, packed, groups, None, scales, None, HALF)[:, -32:]
    part = packed[-32:], groups[-32:], None, scales[-32:], None, HALF
    same(got, ops.linear_w4a8(values, x_scales, *part))


def test_rope():
    heads, d = 8, 128
    (qkv, row), w = rows(3 * heads * d), draw(d, seed=1)
    seq = qkv.shape[1]
    cos, sin = reserve(1, seq, d // 2), reserve(1, seq, d // 2)
    cos[:, -1], sin[:, -1] = 0.6, 0.8
    wanted = ops.joint_qk_norm_rope([row], [w], [w], cos[:, -1:], sin[:, -1:], heads, EPS)
    got = rope.joint_qk_norm_rope([qkv], [w], [w], cos, sin, heads, EPS)
    same(got[2][:, -1:], wanted[2])  # the last program moves v
    rope.qk_norm_rope(qkv, w, w, cos, sin, heads, EPS)
    same(qkv[:, -1:].unflatten(-1, (3, heads, -1))[:, :, 1], wanted[1])  # in place, it turns k


@pytest.mark.parametrize("arch", [89, 90])
@pytest.mark.parametrize("op", ["attention", "linear_attention"])
def test_attention(monkeypatch, op, arch):
    monkeypatch.setattr(launch, "arch", lambda x: arch)
    heads, d = 2, 32
    queries, last = (x.unflatten(-1, (heads, d)) for x in rows(heads * d))
    keys = torch.as_strided(reserve(BEYOND + 2**12, dtype=HALF), (1, 5, heads, d), (8, d, BEYOND, 1))
    keys[:] = draw(1, 5, heads, d, seed=3)
    got = getattr(attention, op)(queries, keys, keys)
    same(got[:, -1, d:], getattr(ops, op)(last, keys, keys)[:, -1, d:])  # the last program's head


def test_pixels():
    x, row = reserve(1, 2, 2**15, 2**15 + 1), draw(2, 128, seed=4)
    x[0, :, -1, -128:] = row
    same(sample.x0_project(x, x, 0.25)[0, 1, -1, -128:], 0.75 * row[1])
    assert torch.equal(decode.to_uint8(x)[0, -1, -128:], ops.to_uint8(row.view(1, 2, 1, 128))[0, 0])
    one = torch.ones(2)
    y = decode.x0_to_vae(x, x.view(1, 2, 2**15, 1, 2**15 + 1, 1), 0.25, one, one, torch.float32)
    same(y[0, :, -1, -128:], 0.75 * row + 1)


def test_group_norm(monkeypatch):
    monkeypatch.setattr(norm, "MAX_CHUNKS", 1)  # one program has the statistics of a whole image
    b, channels, groups = 65535, 8192, 1024
    x = reserve(b, 2, 3, channels, dtype=HALF).permute(0, 3, 1, 2)
    x[-1] = draw(channels, 2, 3)
    w = draw(channels, seed=1)
    got = norm.group_norm_silu(x, groups, w, w, EPS)
    group = channels // groups  # the last programs merge one group and write one pixel
    wanted = ops.group_norm_silu(x[-1:, -group:], 1, w[-group:], w[-group:], EPS)
    same(got[-1, -group:, -1, -1], wanted[0, :, -1, -1])


def test_rms_norm_silu():
    channels, b = 4096, 2**17
    x = reserve(b, 2, 3, channels, dtype=HALF).permute(0, 3, 1, 2)
    x[-1] = draw(channels, 2, 3)
    w = draw(channels, seed=1)
    same(norm.rms_norm_silu(x, w, EPS)[-1, :, -1, -1], ops.rms_norm_silu(x[-1:], w, EPS)[0, :, -1, -1])
