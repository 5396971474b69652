"""Rowwise quantization: a program holds whole rows, so their largest magnitude costs no second read."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .register import torch_op


@triton.jit
def encoded(y, largest, dtype: tl.constexpr):
    """Rows of y [ROWS, BLOCK], of magnitudes up to `largest` [ROWS, 1], as (values in `dtype`, scales [ROWS, 1]).

    The factor is rounded to nearest: one unit less and values half way between two codes go astray."""
    top = tl.maximum(largest, 1e-12)
    if dtype == tl.int8:
        # 1.5 * 2^23: at that size a float32 has no fraction, so the addition rounds, half to even
        values = (y * tl.div_rn(127.0, top) + 12582912.0) - 12582912.0
        scale = top / 127.0
    else:
        values = y * tl.div_rn(448.0, top)
        scale = top / 448.0
    return values.to(dtype), scale


@triton.jit
def quantized(y, dtype: tl.constexpr):
    """`encoded` for whole rows, zero where masked."""
    return encoded(y, tl.max(tl.abs(y), 1, keep_dims=True), dtype)


@triton.jit
def _quantize_rows(x, out, scales, count, seq, width, x_batch, x_row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < count) & (col < width)
    batch, s = (row // seq).to(tl.int64), (row % seq).to(tl.int64)
    v = tl.load(x + batch * x_batch + s * x_row + col, mask, other=0.0).to(tl.float32)
    values, scale = quantized(v, out.dtype.element_ty)
    tl.store(scales + row, scale, row < count)
    tl.store(out + row.to(tl.int64) * width + col, values, mask)


def quantized_like(x: Tensor, dtype: torch.dtype, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Uninitialised values in `dtype` and scales for the rows of x, or for as many rows of `width`."""
    *outer, inner = x.shape
    values = torch.empty(*outer, inner if width is None else width, dtype=dtype, device=x.device)
    return values, torch.empty(*outer, 1, dtype=torch.float32, device=x.device)


def fake_quantized(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`quantized_like` as `torch_op` asks for it; the last argument is the dtype."""
    return quantized_like(x, arguments[-1])


@torch_op("quantize_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor)", fake_quantized)
def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`ops.quantize_rows` on the GPU: x [..., D], any row strides, D <= 16384. float8_e4m3fn needs 8.9 or later."""
    launch.require_floats("quantize_rows", x)
    launch.require_quantized("quantize_rows", dtype, launch.arch(x))
    out, scales = quantized_like(x, dtype)
    if not out.numel():
        return out, scales
    x = launch.rows(x)
    count, width = x.shape[0] * x.shape[1], x.shape[2]
    c = launch.row_tile("quantize_rows", count, width, x.dtype)
    with torch.cuda.device_of(x):
        _quantize_rows[(launch.ceil_div(count, c.rows),)](
            x, out, scales, count, x.shape[1], width, x.stride(0), x.stride(1), c.rows, c.block, num_warps=c.warps
        )
    return out, scales
