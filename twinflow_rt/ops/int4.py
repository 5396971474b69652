"""Linear layers with weights of 4 bits: in groups along the inputs, each with a scale and, where it has one, a minimum.

    weight[n, k] = (code[n, k] * group_scales[n, k // G] - group_minimums[n, k // G]) * scales[n]

code: 0 to 15. group_minimums: None stands for 8 * group_scales, that is, for codes around zero. What stands in the
parentheses is the weight in units of its row's scale, within +-127 (or what `linear.int8_limit` allows): rounded to an
integer it is the int8 weight that `linear_quantized` multiplies. So a product of 8-bit rows (W4A8) widens codes to int8
and is an int8 product from there on; a product of plain rows (W4A16) rounds nothing but its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .declaration import op
from .linear import LIMITS, SMALLEST, linear_quantized

CHUNK = 64  # inputs whose codes are packed together: byte i of 32 has input i in its low, input i + 32 in its high half
GROUPS = (32, 64, 128)  # inputs that can share a scale: 64 and 128 are made here, 32 is what GGUF files have


class Int4Weight(NamedTuple):
    """A weight [N, K] in 4 bits; K is a multiple of CHUNK and of its group G.

    packed: uint8 [N, K / 2], see `pack_codes`; group_scales: float16 [N, K / G]; group_minimums: likewise, or None;
    scales: float32 [N, 1].
    """

    packed: Tensor
    group_scales: Tensor
    group_minimums: Tensor | None
    scales: Tensor


def pack_codes(codes: Tensor) -> Tensor:
    """Return codes, uint8 [..., K] of 0 to 15, as bytes [..., K / 2]: of every 64, the first 32 in the low halves."""
    low, high = codes.unflatten(-1, (-1, 2, CHUNK // 2)).unbind(-2)
    packed: Tensor = low | high << 4
    return packed.flatten(-2)


def unpack_codes(packed: Tensor) -> Tensor:
    """Return the codes that `pack_codes` packed."""
    chunks = packed.unflatten(-1, (-1, CHUNK // 2))
    return torch.stack((chunks & 15, chunks >> 4), -2).flatten(-3)


def row_units(packed: Tensor, group_scales: Tensor, group_minimums: Tensor | None) -> Tensor:
    """Return code * group_scale - group_minimum, float32 [N, K]: the weight in units of its rows' scales."""
    scales = group_scales.float()
    minimums = 8 * scales if group_minimums is None else group_minimums.float()
    codes = unpack_codes(packed).unflatten(-1, (scales.shape[-1], -1))
    units: Tensor = codes * scales[..., None] - minimums[..., None]
    return units.flatten(-2)


def widen(packed: Tensor, group_scales: Tensor, group_minimums: Tensor | None) -> Tensor:
    """Return the weight that W4A8 multiplies: int8 [N, K], `row_units` rounded to nearest even."""
    return row_units(packed, group_scales, group_minimums).round_().to(torch.int8)


def dense(weight: Int4Weight) -> Tensor:
    """Return the weight that the codes stand for, float32 [N, K]."""
    return row_units(*weight[:3]) * weight.scales


def quantize_int4(weight: Tensor, group: int, limit: float = LIMITS[torch.int8]) -> Int4Weight:
    """Return `weight` [N, K] in 4 bits, rounded to nearest: each group's largest magnitude is its code 15 or 1.

    limit: largest magnitude in row units.
    """
    groups = weight.float().unflatten(-1, (-1, group))
    steps = groups.abs().amax(-1).clamp_min(SMALLEST) / 7
    scales = steps.amax(-1, keepdim=True) * 7 / limit
    group_scales = (steps / scales).half()
    codes = (groups / (group_scales.float() * scales).clamp_min(SMALLEST)[..., None]).round_().clamp_(-8, 7) + 8
    return Int4Weight(pack_codes(codes.to(torch.uint8).flatten(-2)), group_scales, None, scales)


def linear_w4a8(
    x: Tensor, x_scales: Tensor, packed: Tensor, group_scales: Tensor, group_minimums: Tensor | None, scales: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y = (x widen(weight)^T) * x_scales * scales^T + bias: `linear_quantized` with the int8 form of a 4-bit weight.

    x: int8 [..., K]; x_scales: float32 [..., 1]; the weight: fields of an `Int4Weight`; bias: [N] or None; dtype: of
    the result, [..., N]. Sums over K are exact, in int32; scaled in float32, rounded once.
    """
    return linear_quantized(x, x_scales, widen(packed, group_scales, group_minimums), scales, bias, dtype)


def linear_w4a16(
    x: Tensor, packed: Tensor, group_scales: Tensor, group_minimums: Tensor | None, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """y = x dense(weight)^T + bias with rows that are not quantized: for sensitive layers, and for few rows.

    x: [..., K], float32, bfloat16 or float16; returns [..., N] in x's dtype. float32 inside, rounded once.
    """
    y = x.float() @ dense(Int4Weight(packed, group_scales, group_minimums, scales)).t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@dataclass(frozen=True)
class Int4Ops:
    """What a layer with 4-bit weights calls."""

    linear_w4a8: Callable[..., Tensor] = op(linear_w4a8)
    linear_w4a16: Callable[..., Tensor] = op(linear_w4a16)
