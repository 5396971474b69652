"""Linear layers in NVIDIA's 4-bit floats, weights and rows: for GPUs of compute capability 12.0.

    tensor[r, k] = e2m1[r, k] * block_scales[r, k // 16] * scale

e2m1: 0, 0.5, 1, 1.5, 2, 3, 4 or 6 with a sign; block_scales: float8_e4m3fn; scale: one float32, which takes the largest
block to e4m3's end. Rows get theirs in every call, so images of a batch share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .declaration import op
from .linear import LIMITS, SMALLEST

BLOCK = 16  # inputs that share a block scale
LARGEST = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, LARGEST)
FP8 = torch.float8_e4m3fn
LEAST = 2.0**-9  # of float8_e4m3fn
TILE = (128, 4)  # block scales that lie together, the four of row r behind those of row r - 32: `arranged`


class Nvfp4(NamedTuple):
    """A tensor [R, K] in 4-bit floats, K a multiple of BLOCK.

    packed: uint8 [R, K / 2], of two codes the first in the low half; block_scales: `arranged`; scale: float32 [1].
    """

    packed: Tensor
    block_scales: Tensor
    scale: Tensor


def arranged(scales: Tensor) -> Tensor:
    """Return block scales [R, C] as products read them: in tiles of 128 x 4, filled with zeros."""
    rows, columns = (-n % tile for n, tile in zip(scales.shape, TILE, strict=True))
    filled = F.pad(scales.view(torch.uint8), (0, columns, 0, rows))
    tiles = filled.unflatten(0, (-1, 4, 32)).unflatten(3, (-1, 4)).permute(0, 3, 2, 1, 4)
    laid: Tensor = tiles.reshape(filled.shape).view(FP8)
    return laid


def dequantize_nvfp4(packed: Tensor, block_scales: Tensor, scale: Tensor) -> Tensor:
    """Return what an `Nvfp4` stands for, float32 [R, K]."""
    rows, columns = len(packed), 2 * packed.shape[1] // BLOCK
    tiles = block_scales.float().view(-1, block_scales.shape[1] // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    plain = tiles.reshape(block_scales.shape)[:rows, :columns]
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    signed = torch.tensor((*VALUES, *(-value for value in VALUES)), dtype=torch.float32, device=packed.device)
    values: Tensor = signed[codes].unflatten(-1, (columns, BLOCK)) * (plain * scale)[..., None]
    return values.flatten(-2)


def quantize_nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [..., K], any float dtype, as an `Nvfp4` of its rows.

    scale = max |x| / (6 * 448); of a block: max |x| / 6 in units of scale, rounded to e4m3 and at least its smallest
    number; codes are rounded to nearest, to even. float32 inside.
    """
    blocks = x.float().reshape(-1, x.shape[-1]).unflatten(-1, (-1, BLOCK))
    tops = blocks.abs().amax(-1) if blocks.numel() else blocks.new_zeros(blocks.shape[:-1])
    top = tops.amax() if tops.numel() else tops.new_zeros(())
    scale = (top / (LARGEST * LIMITS[FP8])).clamp_min(SMALLEST)
    scales = (tops / (LARGEST * scale)).clamp(LEAST, LIMITS[FP8]).to(FP8)
    values = blocks / (scales.float() * scale)[..., None]
    size = values.abs()
    codes = torch.zeros_like(size, dtype=torch.uint8)
    for i, (low, high) in enumerate(pairwise(VALUES)):
        middle = (low + high) / 2
        codes += size >= middle if i % 2 else size > middle
    low, high = torch.where(values < 0, codes + 8, codes).flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4, arranged(scales), scale.view(1)


def linear_nvfp4(
    packed: Tensor, block_scales: Tensor, scale: Tensor, weight: Tensor, weight_block_scales: Tensor,
    weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y = x weight^T + bias with rows [M, K] and a weight [N, K] of `quantize_nvfp4`; returns [M, N] in `dtype`.

    float32 inside, rounded once.
    """
    rows = dequantize_nvfp4(packed, block_scales, scale)
    y = rows @ dequantize_nvfp4(weight, weight_block_scales, weight_scale).t()
    return (y if bias is None else y + bias.float()).to(dtype)


def scaled_mm_nvfp4(
    packed: Tensor, block_scales: Tensor, scale: Tensor, weight: Tensor, weight_block_scales: Tensor,
    weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`linear_nvfp4` by cuBLAS; K and N are multiples of 32."""
    if not len(packed):
        return packed.new_empty(0, len(weight), dtype=dtype)
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    order = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    rows, columns = packed.view(torch.float4_e2m1fn_x2), weight.view(torch.float4_e2m1fn_x2).t()
    return F.scaled_mm(
        rows, columns, [block_scales, scale], recipe, [weight_block_scales, weight_scale], recipe, order, order,
        None if bias is None else bias.to(dtype), dtype,
    )  # fmt: skip


@dataclass(frozen=True)
class Nvfp4Ops:
    """What a layer in 4-bit floats calls."""

    quantize_nvfp4: Callable[..., tuple[Tensor, Tensor, Tensor]] = op(quantize_nvfp4, "triton")
    linear_nvfp4: Callable[..., Tensor] = op(linear_nvfp4, "scaled-mm-nvfp4")
