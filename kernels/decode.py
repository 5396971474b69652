"""Around the VAE: its input from tokens, its norms with SiLU, and its output as interleaved bytes."""

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
    """`block` output elements per program, on `warps` warps."""

    block: int
    warps: int


@dataclass(frozen=True)
class GroupConfig:
    """Tile of `rows` pixels x `block` channels on `warps` warps; `chunk` pixels to one program's statistics."""

    rows: int
    block: int
    warps: int
    chunk: int


MAX_CHUNKS = 512


def config(count: int) -> Config:
    """Elements per program for an output of `count`: four a thread, one 32-bit store of bytes."""
    block = min(max(launch.power_of_two(count), 32), 1024)
    return Config(block, max(block // 128, 1))


def group_config(pixels: int, channels: int) -> GroupConfig:
    """Tiles of 4096 elements; at most 512 chunks an image, so that merging their statistics costs nothing."""
    block = launch.power_of_two(channels)
    rows = min(max(4096 // block, 1), launch.power_of_two(pixels))
    tiles = launch.ceil_div(launch.ceil_div(pixels, rows), MAX_CHUNKS)
    return GroupConfig(rows, block, min(max(rows * block // 512, 1), 16), rows * tiles)


@triton.jit
def _to_uint8(
    image, out, count, channels, height, width, batch_stride, channel_stride, row_stride, column_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixel, c = at // channels, at % channels
    line, w = pixel // width, pixel % width
    b, h = line // height, line % height
    source = image + b * batch_stride + c * channel_stride + h * row_stride + w * column_stride
    v = tl.load(source, at < count, other=0.0).to(tl.float32) * 0.5 + 0.5
    v = tl.minimum(tl.maximum(v, 0.0), 1.0) * 255.0
    # 1.5 * 2^23: at that size a float32 has no fraction, so the addition rounds, half to even
    v = (v + 12582912.0) - 12582912.0
    tl.store(out + at, v.to(tl.uint8), at < count)


def to_uint8(image: Tensor) -> Tensor:
    """`ops.to_uint8` on the GPU: image [B, C, H, W] with any strides; uint8 [B, H, W, C], contiguous."""
    launch.require_floats("to_uint8", image)
    if image.dim() != 4:
        raise ConfigError(f"to_uint8: an image is [B, C, H, W], got {tuple(image.shape)}")
    b, c, h, w = image.shape
    out = torch.empty(b, h, w, c, dtype=torch.uint8, device=image.device)
    if not out.numel():
        return out
    tile = config(out.numel())
    with torch.cuda.device_of(image):
        # no fusion: (v * 255 + 1.5 * 2^23) in one rounding would move values that lie on a half
        _to_uint8[(launch.ceil_div(out.numel(), tile.block),)](
            image, out, out.numel(), c, h, w, *image.stride(), tile.block, num_warps=tile.warps, enable_fp_fusion=False
        )
    return out


@triton.jit
def _x0_to_vae(
    x, velocity, std, mean, out, t, count, channels, height, width, x_batch, x_channel, x_row, x_column,
    v_batch, v_channel, v_row, v_row_in, v_column, v_column_in, PATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    pixel, c = at // channels, at % channels
    line, w = pixel // width, pixel % width
    b, h = line // height, line % height
    a = tl.load(x + b * x_batch + c * x_channel + h * x_row + w * x_column, mask, other=0.0).to(tl.float32)
    token = velocity + b * v_batch + c * v_channel + (h // PATCH) * v_row + (w // PATCH) * v_column
    f = tl.load(token + (h % PATCH) * v_row_in + (w % PATCH) * v_column_in, mask, other=0.0).to(tl.float32)
    y = (a - t * f) * tl.load(std + c, mask, other=0.0) + tl.load(mean + c, mask, other=0.0)
    tl.store(out + at, y.to(out.dtype.element_ty), mask)


def x0_to_vae(x: Tensor, velocity: Tensor, t: float, std: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """`ops.x0_to_vae` on the GPU: x and velocity in any strides; a channels-last tensor in `dtype`."""
    launch.require_floats("x0_to_vae", x, velocity)
    b, c, h, w = x.shape
    p = velocity.shape[-1]
    if velocity.shape != (b, c, h // p, p, w // p, p) or h % p or w % p:
        shapes = f"{tuple(x.shape)} and {tuple(velocity.shape)}"
        raise ConfigError(f"x0_to_vae: needs [B, C, H, W] and [B, C, H/p, p, W/p, p], got {shapes}")
    if any(v.shape != (c,) or v.dtype != torch.float32 or not v.is_contiguous() for v in (std, mean)):
        raise ConfigError(f"x0_to_vae: std and mean are float32 [{c}], got {tuple(std.shape)}, {tuple(mean.shape)}")
    out = torch.empty(b, h, w, c, dtype=dtype, device=x.device)
    launch.require_floats("x0_to_vae", out)
    if out.numel():
        tile = config(out.numel())
        with torch.cuda.device_of(x):
            _x0_to_vae[(launch.ceil_div(out.numel(), tile.block),)](
                x, velocity, std, mean, out, float(t), out.numel(), c, h, w, *x.stride(), *velocity.stride(), p,
                tile.block, num_warps=tile.warps,
            )  # fmt: skip
    return out.permute(0, 3, 1, 2)


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
        raise ConfigError(
            f"group_norm_silu: needs [B, C, H, W], C a multiple of the {groups} groups and at most "
            f"{launch.MAX_WIDTH}, got {tuple(x.shape)}"
        )
    if any(v.shape != (x.shape[1],) or not v.is_contiguous() for v in (weight, bias)):
        raise ConfigError(f"group_norm_silu: weight and bias are [{x.shape[1]}], got {tuple(weight.shape)}")


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


def rms_norm_silu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm_silu` on the GPU: x [B, C, H, W], read in place where it is channels last."""
    launch.require_floats("rms_norm_silu", x)
    if x.dim() != 4 or weight.shape != (x.shape[1],) or weight.dtype != torch.float32 or not weight.is_contiguous():
        raise ConfigError(
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
