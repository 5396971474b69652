"""Normalisation in one pass: a program holds whole rows in registers, statistics in float32.

Two kernels serve all the norms of tokens: `_norm` (RMS or layer norm of one tensor) and `_residual`
(closes a branch into the residual stream and opens the next), each quantizing its normalised rows where
it is given `scales` to fill. The norms of images, with SiLU, follow. Rounding points are those of `ops.norm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .linear import fake_quantized, quantized, quantized_like
from .register import image_like, like, torch_op


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
        raise ValueError(f"{where}: weight {tuple(weight.shape)} is none of [{d}], [1 or {b}, 1, {d}]")
    if weight.dtype != torch.float32:
        raise ValueError(f"{where}: weights are float32, got {weight.dtype}")
    weight = weight if weight.stride(-1) == 1 or d == 1 else weight.contiguous()
    return weight, weight.stride(0) if weight.dim() == 3 and weight.shape[0] > 1 else 0


def _outputs(where: str, x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Uninitialised rows like x's, with scales where they are to be quantized to `dtype`."""
    if dtype is None:
        return like(x), None
    launch.require_quantized(where, dtype, launch.arch(x))
    return quantized_like(x, dtype)


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
        raise ValueError(f"{where}: x {tuple(x.shape)} and branch {tuple(branch.shape)} differ")
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


@torch_op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", like)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` on the GPU: x [B, S, D] with any batch and row strides, D <= 16384."""
    return _single("rms_norm", x, weight, None, eps, center=False)[0]


@torch_op(
    "rms_norm_quantized(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    fake_quantized,
)
def rms_norm_quantized(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`ops.rms_norm_quantized` in one pass; shapes and strides as `rms_norm`."""
    return _single("rms_norm_quantized", x, weight, None, eps, center=False, dtype=dtype)


@torch_op("layer_norm(Tensor x, Tensor? weight, float eps, Tensor? bias=None) -> Tensor", like)
def layer_norm(x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None = None) -> Tensor:
    """`ops.layer_norm` on the GPU; shapes and strides as `rms_norm`. The variance is of the centred row."""
    return _single("layer_norm", x, weight, bias, eps, center=True)[0]


@torch_op(
    "layer_norm_quantized(Tensor x, Tensor? weight, float eps, Tensor? bias, ScalarType dtype) -> (Tensor, Tensor)",
    fake_quantized,
)
def layer_norm_quantized(
    x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`ops.layer_norm_quantized` in one pass; shapes and strides as `rms_norm`."""
    return _single("layer_norm_quantized", x, weight, bias, eps, center=True, dtype=dtype)


def _two_like(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return like(x), like(x)


def _fake_sum_and_quantized(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), *fake_quantized(x, *arguments)


@torch_op("residual_norm(Tensor x, Tensor branch, Tensor post, Tensor pre, float eps) -> (Tensor, Tensor)", _two_like)
def _residual_norm(x: Tensor, branch: Tensor, post: Tensor, pre: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _close("residual_norm", x, branch, post, pre, None, eps, sandwich=True)[:2]


@torch_op("residual_norm_alone(Tensor x, Tensor branch, Tensor post, float eps) -> Tensor", like)
def _residual_norm_alone(x: Tensor, branch: Tensor, post: Tensor, eps: float) -> Tensor:
    return _close("residual_norm", x, branch, post, None, None, eps, sandwich=True, norm=False)[0]


def residual_norm(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """`ops.residual_norm` in one pass: reads x and branch once, writes x' and h once."""
    if pre is None:
        return _residual_norm_alone(x, branch, post, eps), None
    total, normed = _residual_norm(x, branch, post, pre, eps)
    return total, normed


@torch_op(
    "residual_norm_quantized(Tensor x, Tensor branch, Tensor post, Tensor pre, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_sum_and_quantized,
)
def residual_norm_quantized(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.residual_norm_quantized` in one pass: reads x and branch once, writes x', values and scales once."""
    return _close("residual_norm_quantized", x, branch, post, pre, None, eps, sandwich=True, dtype=dtype)


@torch_op(
    "residual_layer_norm(Tensor x, Tensor branch, Tensor? gate, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor)",
    _two_like,
)
def residual_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`ops.residual_layer_norm` in one pass: reads x and branch once, writes x' and h once."""
    return _close("residual_layer_norm", x, branch, gate, weight, bias, eps, sandwich=False)[:2]


@torch_op(
    "residual_layer_norm_quantized(Tensor x, Tensor branch, Tensor? gate, Tensor? weight, Tensor? bias,"
    " float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _fake_sum_and_quantized,
)
def residual_layer_norm_quantized(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.residual_layer_norm_quantized` in one pass: reads x and branch once, writes x', values and scales once."""
    return _close("residual_layer_norm_quantized", x, branch, gate, weight, bias, eps, sandwich=False, dtype=dtype)


# -- of images: over the channels of [B, C, H, W], followed by SiLU ----------------------------------------------

MAX_CHUNKS = 512


@dataclass(frozen=True)
class GroupConfig:
    """Tile of `rows` pixels x `block` channels on `warps` warps; `chunk` pixels to one program's statistics."""

    rows: int
    block: int
    warps: int
    chunk: int


def group_config(pixels: int, channels: int) -> GroupConfig:
    """Tiles of 4096 elements; at most 512 chunks an image, so that merging their statistics costs nothing."""
    block = launch.power_of_two(channels)
    rows = min(max(4096 // block, 1), launch.power_of_two(pixels))
    tiles = launch.ceil_div(launch.ceil_div(pixels, rows), MAX_CHUNKS)
    return GroupConfig(rows, block, min(max(rows * block // 512, 1), 16), rows * tiles)


@triton.jit
def _chunk_statistics(
    x, means, squares, pixels, channels, chunks, x_batch, x_pixel, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # means and sums of squared deviations of every channel over one chunk, tile by tile (Chan et al., 1979)
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    base = x + batch * x_batch + col
    mean = tl.full([1, BLOCK], 0.0, tl.float32)
    square = tl.full([1, BLOCK], 0.0, tl.float32)
    start = chunk * CHUNK
    for at in tl.range(start, tl.minimum(start + CHUNK, pixels), ROWS):
        row = at + tl.arange(0, ROWS)[:, None]
        mask = (row < pixels) & (col < channels)
        v = tl.load(base + row.to(tl.int64) * x_pixel, mask, other=0.0).to(tl.float32)
        seen = (at - start).to(tl.float32)
        count = tl.minimum(pixels - at, ROWS).to(tl.float32)
        tile_mean = tl.sum(v, 0, keep_dims=True) / count
        d = tl.where(mask, v - tile_mean, 0.0)
        shift = tile_mean - mean
        square += tl.sum(d * d, 0, keep_dims=True) + shift * shift * (seen * count / (seen + count))
        mean += shift * (count / (seen + count))
    target = (batch * channels + col) * chunks + chunk
    tl.store(means + target, mean, col < channels)
    tl.store(squares + target, square, col < channels)


@triton.jit
def _merge_statistics(
    means, squares, weight, bias, scale, shift, pixels, channels, chunks, per_group, eps,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # one group of one image: its chunks and channels become a scale and a shift per channel
    first = tl.program_id(0) * per_group
    row = tl.program_id(1).to(tl.int64) * channels + first
    chunk = tl.arange(0, CHUNKS)
    live = chunk < chunks
    count = tl.where(live, tl.minimum(pixels - chunk * CHUNK, CHUNK), 0).to(tl.float32)
    total = tl.full([CHUNKS], 0.0, tl.float32)
    for c in tl.range(0, per_group):
        total += count * tl.load(means + (row + c) * chunks + chunk, live, other=0.0)
    elements = tl.cast(pixels, tl.float32) * per_group
    mean = tl.sum(total, 0) / elements
    total = tl.full([CHUNKS], 0.0, tl.float32)
    for c in tl.range(0, per_group):
        d = tl.load(means + (row + c) * chunks + chunk, live, other=0.0) - mean
        total += tl.load(squares + (row + c) * chunks + chunk, live, other=0.0) + count * d * d
    inverse = tl.rsqrt(tl.sum(total, 0) / elements + eps)
    for c in tl.range(0, per_group):
        factor = tl.load(weight + first + c).to(tl.float32) * inverse
        tl.store(scale + row + c, factor)
        tl.store(shift + row + c, tl.load(bias + first + c).to(tl.float32) - mean * factor)


@triton.jit
def _scale_silu(x, scale, shift, out, pixels, channels, x_batch, x_pixel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, batch = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < pixels) & (col < channels)
    v = tl.load(x + batch * x_batch + row.to(tl.int64) * x_pixel + col, mask, other=0.0).to(tl.float32)
    at = batch * channels + col
    y = v * tl.load(scale + at, col < channels, other=0.0) + tl.load(shift + at, col < channels, other=0.0)
    y = y / (1.0 + tl.exp(-y))
    tl.store(out + (batch * pixels + row) * channels + col, y.to(out.dtype.element_ty), mask)


def _group_check(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> None:
    launch.require_floats("group_norm_silu", x, weight, bias)
    if x.dim() != 4 or groups < 1 or x.shape[1] % groups or x.shape[1] > launch.MAX_WIDTH:
        raise ValueError(
            f"group_norm_silu: needs [B, C, H, W], C a multiple of the {groups} groups and at most "
            f"{launch.MAX_WIDTH}, got {tuple(x.shape)}"
        )
    if any(v.shape != (x.shape[1],) or not v.is_contiguous() for v in (weight, bias)):
        raise ValueError(f"group_norm_silu: weight and bias are [{x.shape[1]}], got {tuple(weight.shape)}")


@torch_op(
    "group_norm_silu(Tensor x, int groups, Tensor weight, Tensor bias, float eps) -> Tensor",
    image_like,
)
def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`ops.group_norm_silu` on the GPU: x [B, C, H, W], read in place where it is channels last.

    Two passes over x, one for statistics and one to apply them, and between them a small one that
    merges the statistics of chunks in a fixed order: the same bits every time.
    """
    _group_check(x, groups, weight, bias)
    b, channels, h, w = x.shape
    out = torch.empty(b, h, w, channels, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out.permute(0, 3, 1, 2)
    pixels = h * w
    x = launch.rows(x.permute(0, 2, 3, 1))
    c = group_config(pixels, channels)
    chunks = launch.ceil_div(pixels, c.chunk)
    means, squares = torch.empty(2, b, channels, chunks, dtype=torch.float32, device=x.device)
    scale, shift = torch.empty(2, b, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _chunk_statistics[(chunks, b)](
            x, means, squares, pixels, channels, chunks, x.stride(0), x.stride(1), c.chunk, c.rows, c.block,
            num_warps=c.warps,
        )  # fmt: skip
        _merge_statistics[(groups, b)](
            means, squares, weight, bias, scale, shift, pixels, channels, chunks, channels // groups, eps,
            c.chunk, launch.power_of_two(chunks), num_warps=1,
        )  # fmt: skip
        _scale_silu[(launch.ceil_div(pixels, c.rows), b)](
            x, scale, shift, out, pixels, channels, x.stride(0), x.stride(1), c.rows, c.block, num_warps=c.warps
        )
    return out.permute(0, 3, 1, 2)


@triton.jit
def _rms_norm_silu(
    x, weight, out, count, pixels, channels, x_batch, x_pixel, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < count) & (col < channels)
    source = x + (row // pixels) * x_batch + (row % pixels) * x_pixel + col
    v = tl.load(source, mask, other=0.0).to(tl.float32)
    y = v * tl.rsqrt(tl.sum(v * v, 1, keep_dims=True) / channels + eps)
    y = y * tl.load(weight + col, col < channels, other=0.0)
    y = y / (1.0 + tl.exp(-y))
    tl.store(out + row * channels + col, y.to(out.dtype.element_ty), mask)


@torch_op("rms_norm_silu(Tensor x, Tensor weight, float eps) -> Tensor", image_like)
def rms_norm_silu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm_silu` on the GPU: x [B, C, H, W], read in place where it is channels last."""
    launch.require_floats("rms_norm_silu", x)
    if x.dim() != 4 or weight.shape != (x.shape[1],) or weight.dtype != torch.float32 or not weight.is_contiguous():
        raise ValueError(
            f"rms_norm_silu: needs [B, C, H, W] and float32 [C], got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    b, channels, h, w = x.shape
    out = torch.empty(b, h, w, channels, dtype=x.dtype, device=x.device)
    if out.numel():
        x = launch.rows(x.permute(0, 2, 3, 1))
        count = b * h * w
        c = launch.row_tile("rms_norm_silu", count, channels, x.dtype)
        with torch.cuda.device_of(x):
            _rms_norm_silu[(launch.ceil_div(count, c.rows),)](
                x, weight, out, count, h * w, channels, x.stride(0), x.stride(1), eps, c.rows, c.block,
                num_warps=c.warps,
            )  # fmt: skip
    return out.permute(0, 3, 1, 2)
