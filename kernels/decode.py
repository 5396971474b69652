"""From the VAE's output to pixels: planar (or channels-last) floats to interleaved bytes."""

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
    """`block` output bytes per program, on `warps` warps."""

    block: int
    warps: int


def config(count: int) -> Config:
    """Bytes per program for an output of `count` bytes: four a thread, one 32-bit store."""
    block = min(max(launch.power_of_two(count), 32), 1024)
    return Config(block, max(block // 128, 1))


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
