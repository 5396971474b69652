"""Activations of the feed-forward blocks: one program, one piece of one row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ConfigError
from . import launch


@dataclass(frozen=True)
class Config:
    """`block` elements of a row per program, on `warps` warps."""

    block: int
    warps: int


def config(width: int, dtype: torch.dtype) -> Config:
    """Pieces for rows of `width` output elements: a 16-byte load and store per thread and operand."""
    per_thread = 16 // dtype.itemsize
    block = min(launch.power_of_two(width), 128 * per_thread)
    return Config(block, max(block // (32 * per_thread), 1))


@triton.jit
def _activation(
    x, out, seq, width, x_batch, x_row, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    batch, s = (row // seq).to(tl.int64), (row % seq).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    source = x + batch * x_batch + s * x_row + col
    a = tl.load(source, mask, other=0.0).to(tl.float32)
    if GATED:
        y = a / (1.0 + tl.exp(-a)) * tl.load(source + width, mask, other=0.0).to(tl.float32)
    else:
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)): the same function, without cancellation
        twice = 1.5957691216057308 * (a + 0.044715 * a * a * a)
        y = a / (1.0 + tl.exp(-twice))
    tl.store(out + row.to(tl.int64) * width + col, y.to(out.dtype.element_ty), mask)


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


def swiglu(x: Tensor) -> Tensor:
    """`ops.swiglu` on the GPU: x [..., 2*hidden], any row strides; returns [..., hidden], contiguous."""
    if x.shape[-1] % 2:
        raise ConfigError(f"swiglu: needs an even last dimension, got {x.shape[-1]}")
    return _launch("swiglu", x, x.shape[-1] // 2, gated=True)


def gelu_tanh(x: Tensor) -> Tensor:
    """`ops.gelu_tanh` on the GPU: x [..., D], any row strides; returns the same shape, contiguous."""
    return _launch("gelu_tanh", x, x.shape[-1], gated=False)
