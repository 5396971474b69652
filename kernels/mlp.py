"""Activations of the feed-forward blocks, and a projection that applies SwiGLU before it writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .linear import encoded, fake_quantized, quantized, quantized_like
from .register import like, torch_op

WIDE_BLOCK = 8192  # bytes of a row that a program takes at a time where it does not hold the row


def config(width: int, dtype: torch.dtype) -> launch.Tile:
    """Pieces for rows of `width` output elements: a 16-byte load and store per thread and operand."""
    per_thread = 16 // dtype.itemsize
    block = min(launch.power_of_two(width), 128 * per_thread)
    return launch.Tile(block, max(block // (32 * per_thread), 1))


@triton.jit
def _activate(source, width, mask, GATED: tl.constexpr):
    a = tl.load(source, mask, other=0.0).to(tl.float32)
    if GATED:
        y = a / (1.0 + tl.exp(-a)) * tl.load(source + width, mask, other=0.0).to(tl.float32)
    else:
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)): the same function, without cancellation
        twice = 1.5957691216057308 * (a + 0.044715 * a * a * a)
        y = a / (1.0 + tl.exp(-twice))
    return y


@triton.jit
def _activation(x, out, seq, width, x_batch, x_row, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    batch, s = (row // seq).to(tl.int64), (row % seq).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    y = _activate(x + batch * x_batch + s * x_row + col, width, mask, GATED)
    tl.store(out + row.to(tl.int64) * width + col, y.to(out.dtype.element_ty), mask)


@triton.jit
def _activation_quantized(
    x, out, scales, count, seq, width, x_batch, x_row, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < count) & (col < width)
    batch, s = (row // seq).to(tl.int64), (row % seq).to(tl.int64)
    y = _activate(x + batch * x_batch + s * x_row + col, width, mask, GATED)
    values, scale = quantized(y, out.dtype.element_ty)
    tl.store(scales + row, scale, row < count)
    tl.store(out + row.to(tl.int64) * width + col, values, mask)


@triton.jit
def _activation_quantized_wide(x, out, scales, seq, width, x_batch, x_row, GATED: tl.constexpr, BLOCK: tl.constexpr):
    # rows that registers do not hold: once for the largest magnitude, once more, out of the cache, for the values
    row = tl.program_id(0)
    batch, s = (row // seq).to(tl.int64), (row % seq).to(tl.int64)
    source, to = x + batch * x_batch + s * x_row, out + row.to(tl.int64) * width
    col = tl.arange(0, BLOCK)[None, :]
    largest = tl.full([1, BLOCK], 0.0, tl.float32)
    for at in tl.range(0, width, BLOCK):
        y = _activate(source + at + col, width, at + col < width, GATED)
        largest = tl.maximum(largest, tl.abs(y))
    largest = tl.max(largest, 1, keep_dims=True)
    for at in tl.range(0, width, BLOCK):
        y = _activate(source + at + col, width, at + col < width, GATED)
        values, scale = encoded(y, largest, out.dtype.element_ty)
        tl.store(to + at + col, values, at + col < width)
        tl.store(scales + row + tl.arange(0, 1)[None, :], scale)


def _launch(where: str, x: Tensor, width: int, gated: bool) -> Tensor:
    launch.require_floats(where, x)
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = launch.rows(x)
    c = config(width, x.dtype)
    with torch.cuda.device_of(x):
        _activation[(x.shape[0] * x.shape[1], launch.ceil_div(width, c.block))](
            x, out, x.shape[1], width, x.stride(0), x.stride(1), gated, c.block, num_warps=c.warps
        )
    return out


def _launch_quantized(where: str, x: Tensor, width: int, gated: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    launch.require_floats(where, x)
    launch.require_quantized(where, dtype, launch.arch(x))
    out, scales = quantized_like(x, dtype, width)
    if not out.numel():
        return out, scales
    x = launch.rows(x)
    count = x.shape[0] * x.shape[1]
    if width > launch.MAX_WIDTH:
        block = WIDE_BLOCK // x.dtype.itemsize
        with torch.cuda.device_of(x):
            _activation_quantized_wide[(count,)](
                x, out, scales, x.shape[1], width, x.stride(0), x.stride(1), gated, block, num_warps=8
            )
        return out, scales
    c = launch.row_tile(where, count, width, x.dtype)
    with torch.cuda.device_of(x):
        _activation_quantized[(launch.ceil_div(count, c.rows),)](
            x, out, scales, count, x.shape[1], width, x.stride(0), x.stride(1), gated, c.rows, c.block,
            num_warps=c.warps,
        )  # fmt: skip
    return out, scales


def _half(where: str, x: Tensor) -> int:
    if x.shape[-1] % 2:
        raise ValueError(f"{where}: needs an even last dimension, got {x.shape[-1]}")
    return x.shape[-1] // 2


@torch_op("swiglu(Tensor x) -> Tensor", lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
def swiglu(x: Tensor) -> Tensor:
    """`ops.swiglu` on the GPU: x [..., 2*hidden], any row strides; returns [..., hidden], contiguous."""
    return _launch("swiglu", x, _half("swiglu", x), gated=True)


@torch_op(
    "swiglu_quantized(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    lambda x, dtype: quantized_like(x, dtype, x.shape[-1] // 2),
)
def swiglu_quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`ops.swiglu_quantized` in one pass over memory: x [..., 2*hidden], any row strides."""
    return _launch_quantized("swiglu_quantized", x, _half("swiglu_quantized", x), True, dtype)


@torch_op("gelu_tanh(Tensor x) -> Tensor", like)
def gelu_tanh(x: Tensor) -> Tensor:
    """`ops.gelu_tanh` on the GPU: x [..., D], any row strides; returns the same shape, contiguous."""
    return _launch("gelu_tanh", x, x.shape[-1], gated=False)


@torch_op("gelu_tanh_quantized(Tensor x, ScalarType dtype) -> (Tensor, Tensor)", fake_quantized)
def gelu_tanh_quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`ops.gelu_tanh_quantized` in one pass over memory: x [..., D], any row strides."""
    return _launch_quantized("gelu_tanh_quantized", x, x.shape[-1], False, dtype)


@dataclass(frozen=True)
class GemmConfig:
    """Tile of `rows` x `columns` outputs, `depth` of the sum a step, warps, and depth of the load pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def gemm_config(arch: int) -> GemmConfig:
    """Tiles of `linear_swiglu`, which has two accumulators and so half the columns of a plain product."""
    if 90 <= arch < 120:
        return GemmConfig(128, 128, 64, 8, 3)
    return GemmConfig(128, 64, 32, 8, 4 if arch == 80 else 3)


@triton.jit
def _linear_swiglu(
    x, weight, out, count, hidden, inner, x_row, w_row,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share 8 row tiles, so that weights are read from L2 and not from memory
    down, across = (count + ROWS - 1) // ROWS, (hidden + COLUMNS - 1) // COLUMNS
    band = tl.program_id(0) // (8 * across)
    height = tl.minimum(down - band * 8, 8)
    within = tl.program_id(0) % (8 * across)
    row = (band * 8 + within % height) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (within // height) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # rows and columns past the end wrap around: in bounds, and never stored
    a = x + (row % count).to(tl.int64) * x_row + k[None, :]
    b = weight + (col % hidden).to(tl.int64)[None, :] * w_row + k[:, None]
    apart = tl.cast(hidden, tl.int64) * w_row
    gate = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    value = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for at in tl.range(0, inner, DEPTH):
        if WHOLE:
            a_block, gates, values = tl.load(a), tl.load(b), tl.load(b + apart)
        else:
            live = at + k < inner
            a_block = tl.load(a, live[None, :], other=0.0)
            gates, values = tl.load(b, live[:, None], other=0.0), tl.load(b + apart, live[:, None], other=0.0)
        gate = tl.dot(a_block, gates, gate)
        value = tl.dot(a_block, values, value)
        a += DEPTH
        b += DEPTH
    y = gate / (1.0 + tl.exp(-gate)) * value
    target = out + row.to(tl.int64) * hidden + col[None, :]
    tl.store(target, y.to(out.dtype.element_ty), (row < count) & (col[None, :] < hidden))


@torch_op(
    "linear_swiglu(Tensor x, Tensor weight) -> Tensor",
    lambda x, weight: x.new_empty((*x.shape[:-1], weight.shape[0] // 2)),
)
def linear_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """`ops.linear_swiglu` on the GPU: one product with both halves of the weight, no w1|w3 result in memory.

    x: [..., K], bfloat16 or float16; weight: [2*hidden, K] with dense rows. Returns [..., hidden]. The products
    stay float32. K that is no multiple of the tile's depth (64 or 32; no network's, but the demo's) costs masks.
    """
    hidden = _half("linear_swiglu", weight.t())
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        raise ValueError(f"linear_swiglu: needs bfloat16 or float16 twice, got {x.dtype} and {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.stride(1) != 1:
        raise ValueError(f"linear_swiglu: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    out = torch.empty(*x.shape[:-1], hidden, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = x.reshape(-1, x.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    c = gemm_config(launch.arch(x))
    with torch.cuda.device_of(x):
        _linear_swiglu[(launch.ceil_div(x.shape[0], c.rows) * launch.ceil_div(hidden, c.columns),)](
            x, weight, out, x.shape[0], hidden, x.shape[1], x.stride(0), weight.stride(0),
            x.shape[1] % c.depth == 0, c.rows, c.columns, c.depth, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return out
