"""Around the VAE: its input from tokens, and its output as interleaved bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .register import image_like, torch_op


def config(count: int) -> launch.Tile:
    """Elements per program for an output of `count`: four a thread, one 32-bit store of bytes."""
    block = min(max(launch.power_of_two(count), 32), 1024)
    return launch.Tile(block, max(block // 128, 1))


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


@torch_op("to_uint8(Tensor image) -> Tensor", lambda image: image_like(image, dtype=torch.uint8).permute(0, 2, 3, 1))
def to_uint8(image: Tensor) -> Tensor:
    """`ops.to_uint8` on the GPU: image [B, C, H, W] with any strides; uint8 [B, H, W, C], contiguous."""
    launch.require_floats("to_uint8", image)
    if image.dim() != 4:
        raise ValueError(f"to_uint8: an image is [B, C, H, W], got {tuple(image.shape)}")
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


@torch_op(
    "x0_to_vae(Tensor x, Tensor velocity, float t, Tensor std, Tensor mean, ScalarType dtype) -> Tensor",
    lambda x, velocity, t, std, mean, dtype: image_like(x, dtype=dtype),
)
def x0_to_vae(x: Tensor, velocity: Tensor, t: float, std: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """`ops.x0_to_vae` on the GPU: x and velocity in any strides; a channels-last tensor in `dtype`."""
    launch.require_floats("x0_to_vae", x, velocity)
    b, c, h, w = x.shape
    p = velocity.shape[-1]
    if velocity.shape != (b, c, h // p, p, w // p, p) or h % p or w % p:
        shapes = f"{tuple(x.shape)} and {tuple(velocity.shape)}"
        raise ValueError(f"x0_to_vae: needs [B, C, H, W] and [B, C, H/p, p, W/p, p], got {shapes}")
    if any(v.shape != (c,) or v.dtype != torch.float32 or not v.is_contiguous() for v in (std, mean)):
        raise ValueError(f"x0_to_vae: std and mean are float32 [{c}], got {tuple(std.shape)}, {tuple(mean.shape)}")
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
