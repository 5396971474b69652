"""Linear layers with weights of 4 bits: in groups along the inputs, each with a scale and, where it has one, a minimum.

    weight[n, k] = (code[n, k] * group_scales[n, k // G] - group_minimums[n, k // G]) * scales[n]

code: 0 to 15. group_minimums: None stands for 8 * group_scales, that is, for codes around zero. What stands in the
parentheses is the weight in units of its row's scale, within +-127: rounded to an integer it is the int8 weight that
`linear_quantized` multiplies. So a product of 8-bit rows (W4A8) widens codes to int8 and is an int8 product from there
on; a product of plain rows (W4A16) rounds nothing but its result.
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
STEPS = (7, 8, 9)  # in which `quantize_int4` tries to count a group's largest magnitude; what is beyond 8 is cut off
ON_CPU, ON_GPU = 1 << 17, 1 << 24  # elements it quantizes at a time: they stay in a CPU's cache, and a GPU is busy
GROUPS = (32, 64, 128)  # inputs that can share a scale: 64 and 128 are made here, 32 is what GGUF files have


class Int4Weight(NamedTuple):
    """A weight [N, K] in 4 bits; K is a multiple of CHUNK and of its group G.

    packed: uint8 [N, K / 2], see `pack_codes`; group_scales: float16 [N, K / G], of either sign; group_minimums:
    likewise, or None; scales: float32 [N, 1].
    """

    packed: Tensor
    group_scales: Tensor
    group_minimums: Tensor | None
    scales: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Int4Weight:
        """Return the weight of `change` of each tensor."""
        return Int4Weight(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]


class Int4Form(NamedTuple):
    """How an `Int4Weight` is made: inputs that share a scale, and whether they share a minimum."""

    group: int
    minimums: bool = False


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


def largest_units(group_scales: Tensor, group_minimums: Tensor | None) -> Tensor:
    """Return the largest magnitude that each group's codes can stand for, float32 in units of `group_scales`."""
    steps = group_scales.float()
    least = 8 * steps if group_minimums is None else group_minimums.float()  # what code 0 stands for, negated
    return torch.maximum(least.abs(), (15 * steps - least).abs())


def quantize_int4(weight: Tensor, group: int) -> Int4Weight:
    """Return `weight` [N, K] in 4 bits, each group in steps that leave about the least squared error; no minimums.

    Other ways measured no better for the bits they take: docs/precision.md.
    """
    n, k = weight.shape
    packed = torch.empty((n, k // 2), dtype=torch.uint8, device=weight.device)
    steps = torch.empty((n, k // group), dtype=torch.float32, device=weight.device)
    rows = max((ON_CPU if weight.device.type == "cpu" else ON_GPU) // k, 1)
    for i in () if weight.is_meta else range(0, n, rows):
        codes, steps[i : i + rows] = _in_steps(weight[i : i + rows].detach().float().unflatten(-1, (-1, group)))
        packed[i : i + rows] = pack_codes(codes.flatten(-2))
    scales = steps.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) * (8 / LIMITS[torch.int8])
    return Int4Weight(packed, (steps / scales).half(), None, scales)


def _in_steps(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [..., G] around 8, and signed steps [...], of groups [..., G].

    `STEPS` are tried for a group's largest magnitude, whose sign the step takes so that it has code 0: with its codes
    each gives the step of least squares, and the step that leaves least is kept.
    """
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    top = torch.where(high > -low, high, low)
    top = torch.where(top == 0, SMALLEST, top)
    shares = groups / -top
    explained, step = torch.zeros_like(top), torch.ones_like(top)
    for n in STEPS:
        codes = (shares * n).round_().clamp_(-8, 7)
        product = torch.linalg.vecdot(codes, shares)[..., None]
        best = product / torch.linalg.vecdot(codes, codes)[..., None]
        better = best * product > explained
        explained, step = torch.where(better, best * product, explained), torch.where(better, best, step)
    codes = (shares / step).round_().clamp_(-8, 7).add_(8)
    return codes.to(torch.uint8), (step * -top)[..., 0]


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

    linear_w4a8: Callable[..., Tensor] = op(linear_w4a8, "triton", "native")
    linear_w4a16: Callable[..., Tensor] = op(linear_w4a16, "triton", "native")
