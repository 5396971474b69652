"""Normalisation in one pass: a program holds whole rows in registers, statistics in float32.

Two kernels serve all the ops: `_norm` (RMS or layer norm of one tensor) and `_residual` (closes a
branch into the residual stream and opens the next), each quantizing its normalised rows where it is
given `scales` to fill. Rounding points are those of `ops.norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ConfigError
from . import launch
from .linear import quantized


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
def _store(out, scales, y, at, row, count, mask):
    if scales is not None:
        y, scale = quantized(y, out.dtype.element_ty)
        tl.store(scales + row, scale, row < count)
    tl.store(out + at, y.to(out.dtype.element_ty), mask)


@triton.jit
def _norm(
    x, weight, bias, out, scales, count, seq, width, x_batch, x_row, weight_batch, bias_batch, eps,
    CENTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < count) & (col < width)
    batch, s = (row // seq).to(tl.int64), (row % seq).to(tl.int64)
    v = tl.load(x + batch * x_batch + s * x_row + col, mask, other=0.0).to(tl.float32)
    y = _normalise(v, mask, width, eps, CENTER)
    y = _scaled(y, weight, bias, weight_batch, bias_batch, batch, col, mask)
    _store(out, scales, y, row.to(tl.int64) * width + col, row, count, mask)


@triton.jit
def _residual(
    x, branch, post, weight, bias, out, normed, scales, count, seq, width, x_batch, x_row, branch_batch,
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
        _store(normed, scales, y, at, row, count, mask)


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


def _outputs(where: str, x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Uninitialised rows like x's, with scales where they are to be quantized to `dtype`."""
    if dtype is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    launch.require_quantized(where, dtype, launch.arch(x))
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device), scales


def _single(
    where: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    launch.require_floats(where, x)
    out, scales = _outputs(where, x, dtype)
    if not out.numel():
        return out, scales
    x = launch.rows(x)
    count, width = x.shape[0] * x.shape[1], x.shape[2]
    weight, weight_batch = _per_sample(where, x, weight)
    bias, bias_batch = _per_sample(where, x, bias)
    c = launch.row_tile(where, count, width, x.dtype)
    with torch.cuda.device_of(x):
        _norm[(launch.ceil_div(count, c.rows),)](
            x, weight, bias, out, scales, count, x.shape[1], width, x.stride(0), x.stride(1), weight_batch,
            bias_batch, eps, center, c.rows, c.block, num_warps=c.warps,
        )  # fmt: skip
    return out, scales


def _close(
    where: str, x: Tensor, branch: Tensor, post: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, sandwich: bool, norm: bool = True, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    launch.require_floats(where, x, branch)
    if x.shape != branch.shape:
        raise ConfigError(f"{where}: x {tuple(x.shape)} and branch {tuple(branch.shape)} differ")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed, scales = _outputs(where, x, dtype) if norm else (None, None)
    if not out.numel():
        return out, normed, scales
    x, branch = launch.rows(x), launch.rows(branch)
    count, width = x.shape[0] * x.shape[1], x.shape[2]
    post, post_batch = _per_sample(where, x, post)
    weight, weight_batch = _per_sample(where, x, weight)
    bias, bias_batch = _per_sample(where, x, bias)
    c = launch.row_tile(where, count, width, x.dtype, mixed=scales is not None)
    with torch.cuda.device_of(x):
        _residual[(launch.ceil_div(count, c.rows),)](
            x, branch, post, weight, bias, out, normed, scales, count, x.shape[1], width, x.stride(0), x.stride(1),
            branch.stride(0), branch.stride(1), post_batch, weight_batch, bias_batch, eps,
            sandwich, not sandwich, c.rows, c.block, num_warps=c.warps,
        )  # fmt: skip
    return out, normed, scales


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` on the GPU: x [B, S, D] with any batch and row strides, D <= 16384."""
    return _single("rms_norm", x, weight, None, eps, center=False)[0]


def rms_norm_quantized(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`ops.rms_norm_quantized` in one pass; shapes and strides as `rms_norm`."""
    return _single("rms_norm_quantized", x, weight, None, eps, center=False, dtype=dtype)


def layer_norm(x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None = None) -> Tensor:
    """`ops.layer_norm` on the GPU; shapes and strides as `rms_norm`. The variance is of the centred row."""
    return _single("layer_norm", x, weight, bias, eps, center=True)[0]


def layer_norm_quantized(
    x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`ops.layer_norm_quantized` in one pass; shapes and strides as `rms_norm`."""
    return _single("layer_norm_quantized", x, weight, bias, eps, center=True, dtype=dtype)


def residual_norm(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """`ops.residual_norm` in one pass: reads x and branch once, writes x' and h once."""
    return _close("residual_norm", x, branch, post, pre, None, eps, sandwich=True, norm=pre is not None)[:2]


def residual_norm_quantized(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.residual_norm_quantized` in one pass: reads x and branch once, writes x', values and scales once."""
    return _close("residual_norm_quantized", x, branch, post, pre, None, eps, sandwich=True, dtype=dtype)


def residual_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """`ops.residual_layer_norm` in one pass: reads x and branch once, writes x' and h once."""
    return _close("residual_layer_norm", x, branch, gate, weight, bias, eps, sandwich=False)[:2]


def residual_layer_norm_quantized(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.residual_layer_norm_quantized` in one pass: reads x and branch once, writes x', values and scales once."""
    return _close("residual_layer_norm_quantized", x, branch, gate, weight, bias, eps, sandwich=False, dtype=dtype)
