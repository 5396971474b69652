"""`ops.conv3x3` on a CPU: native transforms around oneDNN's products, one strip of tiles after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..conv import LEAST, STRIP, winograd_points, winograd_products
from ..tracing import watched
from .register import address, roomy, run


def conv_winograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, enlarged: bool = False, added: Tensor | None = None
) -> Tensor:
    """See ops/conv.py; weight: a `winograd_weight`. float32; the result is channels-last."""
    if watched():
        raise RuntimeError("Winograd's form reads and writes by address, which no tracer sees: give it plain weights")
    x = x.contiguous(memory_format=torch.channels_last)
    batch, inner, height, width = x.shape
    points, times = winograd_points(enlarged), 2 if enlarged else 1
    outer, size = weight.shape[0] // points, (times * height, times * width)
    if weight.shape[1] != inner or (bias is not None and bias.shape != (outer,)):
        raise ValueError(f"{inner} channels meet a weight of {weight.shape[1]}, or a bias is not [{outer}]")
    out = roomy(torch.empty((batch, outer, *size), dtype=x.dtype, memory_format=torch.channels_last))
    if added is not None:
        if added.shape != out.shape or added.dtype != x.dtype:
            raise ValueError(f"what is added must be {x.dtype} {tuple(out.shape)}, not {added.dtype} {added.shape}")
        added = added.contiguous(memory_format=torch.channels_last)
    tiles = batch * -(-size[0] // 2) * -(-size[1] // 2)
    strip = x.new_empty((min(STRIP, tiles), points, inner)) if tiles >= LEAST else x.new_zeros((LEAST, points, inner))
    for first in range(0, tiles, STRIP):
        last = min(first + STRIP, tiles)
        part = strip[: max(last - first, LEAST)]
        run("winograd_input", x, x.data_ptr(), part.data_ptr(), x.shape, first, last, enlarged)
        sums, more = winograd_products(part, weight, points), (address(bias), address(added))
        run("winograd_output", x, sums.data_ptr(), *more, out.data_ptr(), out.shape, first, last, enlarged)
    return out
