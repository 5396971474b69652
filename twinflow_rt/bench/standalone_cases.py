"""Ops beside `OpTable`, at their networks' sizes: those of quantized rows, and the VAE's.

As `op_cases`, for functions of `twinflow_rt.ops` that networks reach through `RowTable`, or not through a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops.rows import Op
from ..ops.select import IMPLEMENTATIONS, ROW_OPS, Target, triton_refuses
from .op_cases import EPS, Case, Drawing, Sizes, _Draw, exact_gelu, exact_layer, exact_rms

STEMS = {"group_norm_silu": "decode", "x0_to_vae": "decode"}  # op in no table -> the module of kernels/ that has it
QUANTIZED = {"float8": torch.float8_e4m3fn, "int8": torch.int8}


def launcher(op: str) -> Op:
    """The Triton launcher of an op in no table; imports triton."""
    found: Op = getattr(import_module(f"twinflow_rt.kernels.{STEMS[op]}"), op)
    return found


def implementations(case: Case, target: Target) -> tuple[dict[str, Op], dict[str, str]]:
    """The implementations that serve the case on `target` here, and why the others do not."""
    if case.op in STEMS:
        reason = triton_refuses(target)
        return ({}, {"triton": reason}) if reason else ({"triton": launcher(case.op)}, {})
    usable, refused = {}, {}
    for name, implementation in IMPLEMENTATIONS[case.op].items():
        if name == "eager":
            continue
        if reason := implementation.refuses(aimed(case, target)):
            refused[name] = reason
        else:
            usable[name] = implementation.load()
    return usable, refused


def aimed(case: Case, target: Target) -> Target:
    """`target` for networks of the rows that a case of `ROW_OPS` has."""
    kind = case.name.rpartition(", ")[2]
    return replace(target, rows=QUANTIZED[kind]) if case.op in ROW_OPS else target


def standalone(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> list[Case]:
    """A case per op, the quantizing ones for float8 and int8."""
    draw = _Draw(dtype, torch.device(device))
    rows = [c for kind in QUANTIZED for c in (*_quantizing(sizes, draw, kind), _product(sizes, draw, kind))]
    return rows + _vae(sizes, draw)


def dequantized(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(..., values, scales) -> (..., values * scales): what a matrix product will see."""
    *before, values, scales = result
    return (*before, values.float() * scales)


def _quantizing(s: Sizes, draw: _Draw, kind: str) -> list[Case]:
    quantized = QUANTIZED[kind]
    shape, count = (1, s.tokens, s.width), s.tokens * s.width
    x, branch = (lambda: draw(*shape)), (lambda: draw(*shape, seed=5))
    w: Drawing = lambda seed=1: draw.weight(1, 1, s.width, seed=seed)
    bias = lambda: w(3) - 1

    def residual(
        x: Tensor, branch: Tensor, post: Tensor, pre: Tensor, eps: float, _: torch.dtype
    ) -> tuple[Tensor, ...]:
        total = x.double() + exact_rms(branch, post, eps)
        return total, exact_rms(total.to(x.dtype), pre, eps)

    def gated(
        x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, _: torch.dtype
    ) -> tuple[Tensor, ...]:
        total = x.double() + gate.double() * branch.double()
        return total, exact_layer(total.to(x.dtype), weight, eps, bias)

    def swiglu(x: Tensor, _: torch.dtype) -> tuple[Tensor]:
        a, g = x.double().chunk(2, -1)
        return (a / (1 + (-a).exp()) * g,)

    hidden = s.tokens * s.hidden
    wide: Drawing = lambda n: 2 * draw(1, s.tokens, n)
    table: list[tuple[str, Callable[[], tuple[Any, ...]], Callable[..., tuple[Tensor, ...]], int]] = [
        ("quantize_rows", lambda: (x(), quantized), lambda x, _: (x.double(),), count * (draw.item + 1)),
        ("rms_norm_quantized", lambda: (x(), w(), EPS, quantized), lambda x, w, e, _: (exact_rms(x, w, e),),
         count * (draw.item + 1)),
        ("layer_norm_quantized", lambda: (x(), w(), EPS, bias(), quantized),
         lambda x, w, e, b, _: (exact_layer(x, w, e, b),), count * (draw.item + 1)),
        ("residual_norm_quantized", lambda: (x(), branch(), w(), w(2), EPS, quantized), residual,
         count * (3 * draw.item + 1)),
        ("residual_layer_norm_quantized", lambda: (x(), branch(), bias(), w(), bias(), EPS, quantized), gated,
         count * (3 * draw.item + 1)),
        ("swiglu_quantized", lambda: (wide(2 * s.hidden), quantized), swiglu, hidden * (2 * draw.item + 1)),
        ("gelu_tanh_quantized", lambda: (wide(s.hidden), quantized), lambda x, _: (exact_gelu(x),),
         hidden * (draw.item + 1)),
    ]  # fmt: skip
    return [Case(op, f"{op}, {kind}", args, exact, size, read=dequantized) for op, args, exact, size in table]


def _product(s: Sizes, draw: _Draw, kind: str) -> Case:
    def inputs() -> tuple[Any, ...]:
        weight = draw(s.width, s.width, seed=1) * s.width**-0.5
        rows = (ops.quantize_rows(x, QUANTIZED[kind]) for x in (draw(1, s.tokens, s.width), weight))
        return *(part for pair in rows for part in pair), draw(s.width, seed=2), draw.dtype

    def exact(x: Tensor, scales: Tensor, w: Tensor, w_scales: Tensor, bias: Tensor, _: torch.dtype) -> tuple[Tensor]:
        return (x.double() * scales.double() @ (w.double() * w_scales.double()).t() + bias.double(),)

    moved = s.tokens * s.width * (1 + draw.item) + s.width**2
    return Case("linear_quantized", f"linear_quantized, {kind}", inputs, exact, moved, 2 * s.tokens * s.width**2)


def _vae(s: Sizes, draw: _Draw) -> list[Case]:
    channels, edge, latents = 128, s.pixels, math.prod(s.latents)

    def image() -> tuple[Any, ...]:
        x = draw(1, channels, edge, edge).contiguous(memory_format=torch.channels_last)
        return x, 32, draw.weight(channels), draw.weight(channels, seed=1) - 1, 1e-6

    def latent() -> tuple[Any, ...]:
        c, h, w = s.latents
        tokens = draw(1, h // 2, w // 2, 2, 2, c)
        std = draw.weight(c)
        return draw(1, c, h, w), tokens.permute(0, 5, 1, 3, 2, 4), 1.0, std, std - 1, draw.dtype

    def group(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor]:
        return (F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double(), eps)),)

    def unpacked(x: Tensor, velocity: Tensor, t: float, std: Tensor, mean: Tensor, _: torch.dtype) -> tuple[Tensor]:
        x0 = x.double() - t * velocity.double().reshape(x.shape)
        return (x0 * std.double().view(-1, 1, 1) + mean.double().view(-1, 1, 1),)

    return [
        Case("group_norm_silu", "group_norm_silu", image, group, 3 * channels * edge**2 * draw.item),
        Case("x0_to_vae", "x0_to_vae", latent, unpacked, 3 * latents * draw.item),
    ]
