"""Normalisation in one pass: a program holds whole rows in registers, statistics in float32.

Two kernels serve the four ops: `_norm` (RMS or layer norm of one tensor) and `_residual` (closes a
branch into the residual stream and opens the next). Rounding points are those of `ops.norm`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ConfigError
from . import launch

MAX_WIDTH = 16384  # a wider row no longer fits the registers of one block


@dataclass(frozen=True)
class Config:
    """Tile of one program: `rows` x `block` elements on `warps` warps."""

    rows: int
    block: int
    warps: int


def config(count: int, width: int, dtype: torch.dtype) -> Config:
    """Tile for `count` rows of `width` elements; ConfigError where a row is too wide.

    A thread holds 16 elements (8 of float32, so that its loads stay 16 bytes wide but few), more
    once 16 warps are in use. Narrow rows share a program, as many as there are.
    """
    if width > MAX_WIDTH:
        raise ConfigError(f"norm: rows of at most {MAX_WIDTH} elements, got {width}")
    block = launch.power_of_two(width)
    rows = min(max(2048 // block, 1), launch.power_of_two(count))
    per_warp = 32 * (8 if dtype.itemsize == 4 else 16)
    return Config(rows, block, min(max(rows * block // per_warp, 1), 16))


@triton.jit
def _normalise(v, mask, width, eps, CENTER: tl.constexpr):
    if CENTER:
        v = tl.where(mask, v - tl.sum(v, 1, keep_dims=True) / width, 0.0)
    return v * tl.rsqrt(tl.sum(v * v, 1, keep_dims=True) / width + eps)


@triton.jit
def _scaled(v, weight, bias, weight_batch, bias_batch, batch, col, mask):
    if weight is not None:
        v = v * tl.load(weight + batch * weight_batch + col, mask, other=0.0)
    if bias is not None:
        v = v + tl.load(bias + batch * bias_batch + col, mask, other=0.0)
    return v


@triton.jit
def _norm(
    x, weight, bias, out, count, seq, width, x_batch, x_row, weight_batch, bias_batch, eps,
    CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < count) & (col < width)
    batch, s = (row // seq).to(tl.int64), (row % seq).to(tl.int64)
    v = tl.load(x + batch * x_batch + s * x_row + col, mask, other=0.0).to(tl.float32)
    y = _normalise(v, mask, width, eps, CENTER)
    y = _scaled(y, weight, bias, weight_batch, bias_batch, batch, col, mask)
    tl.store(out + row.to(tl.int64) * width + col, y.to(out.dtype.element_ty), mask)


@triton.jit
def _residual(
    x, branch, post, weight, bias, out, normed, count, seq, width, x_batch, x_row, branch_batch,
    branch_row, post_batch, weight_batch, bias_batch, eps,
    SANDWICH: tl.constexpr, CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < count) & (col < width)
    batch, s = (row // seq).to(tl.int64), (row % seq).to(tl.int64)
    b = tl.load(branch + batch * branch_batch + s * branch_row + col, mask, other=0.0).to(tl.float32)
    if SANDWICH:
        b = _normalise(b, mask, width, eps, False)
    b = _scaled(b, post, None, post_batch, 0, batch, col, mask)
    v = tl.load(x + batch * x_batch + s * x_row + col, mask, other=0.0).to(tl.float32)
    total = (v + b).to(out.dtype.element_ty)
    at = row.to(tl.int64) * width + col
    tl.store(out + at, total, mask)
    if normed is not None:
        y = _normalise(total.to(tl.float32), mask, width, eps, CENTER)
        y = _scaled(y, weight, bias, weight_batch, bias_batch, batch, col, mask)
        tl.store(normed + at, y.to(out.dtype.element_ty), mask)


def _per_sample(where: str, x: Tensor, weight: Tensor | None) -> tuple[Tensor | None, int]:
    """`weight` with its last dimension contiguous, and the elements between two samples' rows of it."""
    if weight is None:
        return None, 0
    b, _, d = x.shape
    if weight.shape not in ((d,), (1, 1, d), (b, 1, d)):
        raise ConfigError(f"{where}: weight {tuple(weight.shape)} is none of [{d}], [1 or {b}, 1, {d}]")
    if weight.dtype != torch.float32:
        raise ConfigError(f"{where}: weights are float32, got {weight.dtype}")
    weight = weight if weight.stride(-1) == 1 or d == 1 else weight.contiguous()
    return weight, weight.stride(0) if weight.dim() == 3 and weight.shape[0] > 1 else 0


def _single(where: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool) -> Tensor:
    launch.require_floats(where, x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = launch.rows(x)
    count, width = x.shape[0] * x.shape[1], x.shape[2]
    weight, weight_batch = _per_sample(where, x, weight)
    bias, bias_batch = _per_sample(where, x, bias)
    c = config(count, width, x.dtype)
    with torch.cuda.device_of(x):
        _norm[(launch.ceil_div(count, c.rows),)](
            x, weight, bias, out, count, x.shape[1], width, x.stride(0), x.stride(1), weight_batch,
            bias_batch, eps, center, c.rows, c.block, num_warps=c.warps,
        )  # fmt: skip
    return out


def _close(
    where: str, x: Tensor, branch: Tensor, post: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, sandwich: bool, norm: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    launch.require_floats(where, x, branch)
    if x.shape != branch.shape:
        raise ConfigError(f"{where}: x {tuple(x.shape)} and branch {tuple(branch.shape)} differ")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty_like(out) if norm else None
    if not out.numel():
        return out, normed
    x, branch = launch.rows(x), launch.rows(branch)
    count, width = x.shape[0] * x.shape[1], x.shape[2]
    post, post_batch = _per_sample(where, x, post)
    weight, weight_batch = _per_sample(where, x, weight)
    bias, bias_batch = _per_sample(where, x, bias)
    c = config(count, width, x.dtype)
    with torch.cuda.device_of(x):
        _residual[(launch.ceil_div(count, c.rows),)](
            x, branch, post, weight, bias, out, normed, count, x.shape[1], width, x.stride(0), x.stride(1),
            branch.stride(0), branch.stride(1), post_batch, weight_batch, bias_batch, eps,
            sandwich, not sandwich, c.rows, c.block, num_warps=c.warps,
        )  # fmt: skip
    return out, normed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` on the GPU: x [B, S, D] with any batch and row strides, D <= 16384."""
    return _single("rms_norm", x, weight, None, eps, center=False)


def layer_norm(x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None = None) -> Tensor:
    """`ops.layer_norm` on the GPU; shapes and strides as `rms_norm`. The variance is of the centred row."""
    return _single("layer_norm", x, weight, bias, eps, center=True)


def residual_norm(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """`ops.residual_norm` in one pass: reads x and branch once, writes x' and h once."""
    return _close("residual_norm", x, branch, post, pre, None, eps, sandwich=True, norm=pre is not None)


def residual_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """`ops.residual_layer_norm` in one pass: reads x and branch once, writes x' and h once."""
    return _close("residual_layer_norm", x, branch, gate, weight, bias, eps, sandwich=False, norm=True)
