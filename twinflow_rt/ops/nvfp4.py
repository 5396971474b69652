"""Linear layers in NVIDIA's 4-bit floats (nvfp4), weights and rows alike: for GPUs of compute capability 12.0.

    tensor[r, k] = e2m1[r, k] * group_scales[r, k // 16] * scales

in the fields of an `int4.Int4Weight`: packed uint8 [R, K / 2], of two codes the first in the low half; group_scales
float8_e4m3fn [R, K / 16]; no minimums; scales float32 [R, 1], one number, which takes the largest group to e4m3's end.
Rows are quantized in every call, those of a batch with one scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .declaration import Op, op
from .int4 import Int4Weight
from .linear import LIMITS, SMALLEST

GROUP = 16  # inputs that share a group scale
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; codes 8 to 15 are their negatives
FP8, LEAST = torch.float8_e4m3fn, 2.0**-9  # and its smallest positive number


def dequantize_nvfp4(packed: Tensor, group_scales: Tensor, group_minimums: Tensor | None, scales: Tensor) -> Tensor:
    """Return what the codes stand for, float32 [R, K]."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()
    signed = torch.tensor((*VALUES, *(-value for value in VALUES)), dtype=torch.float32, device=packed.device)
    return signed[codes] * (group_scales.float() * scales).repeat_interleave(GROUP, -1)


def quantize_nvfp4(x: Tensor) -> Int4Weight:
    """Return x [..., K], any float dtype, as rows of 4-bit floats.

    scales = max |x| / (6 * 448); of a group: max |x| / 6 in units of it, rounded to e4m3, at least its smallest number;
    codes are rounded to nearest, to even. float32 inside.
    """
    groups = x.float().reshape(-1, x.shape[-1]).unflatten(-1, (-1, GROUP))
    tops = torch.linalg.vector_norm(groups, torch.inf, -1)
    scales = (F.pad(tops.flatten(), (0, 1)).amax(0, True) / (VALUES[-1] * LIMITS[FP8])).clamp_min(SMALLEST)
    group_scales = (tops / (VALUES[-1] * scales)).clamp(LEAST, LIMITS[FP8]).to(FP8)
    values = groups / (group_scales.float() * scales)[..., None]
    codes = 8 * (values < 0).to(torch.uint8)
    for i, (low, high) in enumerate(pairwise(VALUES)):
        codes += values.abs() >= (low + high) / 2 if i % 2 else values.abs() > (low + high) / 2
    first, second = codes.flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return Int4Weight(first | second << 4, group_scales, None, scales.repeat(len(groups), 1))


def linear_nvfp4(
    x: Tensor, packed: Tensor, group_scales: Tensor, group_minimums: Tensor | None, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """y = x weight^T + bias, x [..., K] by its 4-bit floats; returns [..., N] in x's dtype. float32, rounded once."""
    y = dequantize_nvfp4(*quantize_nvfp4(x)) @ dequantize_nvfp4(packed, group_scales, None, scales).t()
    return (y if bias is None else y + bias.float()).to(x.dtype).view(*x.shape[:-1], len(packed))


@dataclass(frozen=True)
class Nvfp4Ops:
    """What a layer in 4-bit floats calls."""

    linear_nvfp4: Op = op(linear_nvfp4, "triton")
