"""Closing step of the sampler, elementwise over latents of any layout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .register import like, torch_op


def config(count: int) -> launch.Tile:
    """Elements per program for `count` elements: four a thread, so that small latents fill the chip."""
    block = min(max(launch.power_of_two(count), 32), 512)
    return launch.Tile(block, max(block // 128, 1))


@triton.jit
def _x0_project(
    x, velocity, out, t, count, channels, height, width, x_batch, x_channel, x_row, x_column,
    v_batch, v_channel, v_row, v_column, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    line, w = at // width, at % width
    plane, h = line // height, line % height
    b, c = plane // channels, plane % channels
    a = tl.load(x + b * x_batch + c * x_channel + h * x_row + w * x_column, mask, other=0.0).to(tl.float32)
    f = tl.load(velocity + b * v_batch + c * v_channel + h * v_row + w * v_column, mask, other=0.0).to(tl.float32)
    tl.store(out + at, (a - t * f).to(out.dtype.element_ty), mask)


@torch_op("x0_project(Tensor x, Tensor velocity, float t=1.0) -> Tensor", like)
def x0_project(x: Tensor, velocity: Tensor, t: float = 1.0) -> Tensor:
    """`ops.x0_project` on the GPU: x, velocity [B, C, H, W] with any strides; contiguous, in x's dtype."""
    launch.require_floats("x0_project", x, velocity)
    if x.dim() != 4 or x.shape != velocity.shape:
        raise ValueError(f"x0_project: needs two [B, C, H, W], got {tuple(x.shape)} and {tuple(velocity.shape)}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    tile = config(out.numel())
    with torch.cuda.device_of(x):
        _x0_project[(launch.ceil_div(out.numel(), tile.block),)](
            x, velocity, out, float(t), out.numel(), *x.shape[1:], *x.stride(), *velocity.stride(),
            tile.block, num_warps=tile.warps,
        )  # fmt: skip
    return out
