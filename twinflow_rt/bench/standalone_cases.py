"""The ops of 8-bit networks, at their networks' sizes: as `op_cases`, for `QuantizedOps` and float8 attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.declaration import Op
from ..ops.selection import IMPLEMENTATIONS, QUANTIZED_OPS, Target
from .case import EPS, Case, Draw, Drawing, Sizes, exact_attention, exact_gelu, exact_layer, exact_rms

QUANTIZED = {"float8": torch.float8_e4m3fn, "int8": torch.int8}


def implementations(case: Case, target: Target, key: str | None = None) -> tuple[dict[str, Op], dict[str, str]]:
    """The implementations that serve the case on `target` here, and why the others do not. key: the case's in
    `IMPLEMENTATIONS`, if not its op."""
    usable, refused = {}, {}
    for name, implementation in IMPLEMENTATIONS[key or case.op].items():
        if name == "eager":
            continue
        if reason := implementation.refuses(aimed(case, target)):
            refused[name] = reason
        else:
            usable[name] = implementation.load()
    return usable, refused


def aimed(case: Case, target: Target) -> Target:
    """`target` for networks of the rows that a case of `QUANTIZED_OPS` has."""
    kind = case.name.rpartition(", ")[2]
    return replace(target, quantized=QUANTIZED[kind]) if case.op in QUANTIZED_OPS else target


def standalone(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> list[Case]:
    """A case per op, the quantizing ones for float8 and int8."""
    draw = Draw(dtype, torch.device(device))
    rows = [c for kind in QUANTIZED for c in (*_quantizing(sizes, draw, kind), _product(sizes, draw, kind))]
    return [*rows, _attention(sizes, draw)]


def dequantized(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(..., values, scales) -> (..., values * scales): what a matrix product will see."""
    *before, values, scales = result
    return (*before, values.float() * scales)


def _quantizing(s: Sizes, draw: Draw, kind: str) -> list[Case]:
    quantized = QUANTIZED[kind]
    shape, count = (1, s.tokens, s.width), s.tokens * s.width
    x: Drawing = lambda: draw(*shape)
    branch: Drawing = lambda: draw(*shape, seed=5)
    w: Drawing = lambda seed=1: draw.weight(1, 1, s.width, seed=seed)
    bias: Drawing = lambda: w(3) - 1

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


def _product(s: Sizes, draw: Draw, kind: str) -> Case:
    def inputs() -> tuple[Any, ...]:
        weight = draw(s.width, s.width, seed=1) * s.width**-0.5
        rows = (ops.quantize_rows(x, QUANTIZED[kind]) for x in (draw(1, s.tokens, s.width), weight))
        return *(part for pair in rows for part in pair), draw(s.width, seed=2), draw.dtype

    def exact(x: Tensor, scales: Tensor, w: Tensor, w_scales: Tensor, bias: Tensor, _: torch.dtype) -> tuple[Tensor]:
        return (x.double() * scales.double() @ (w.double() * w_scales.double()).t() + bias.double(),)

    moved = s.tokens * s.width * (1 + draw.item) + s.width**2
    return Case("linear_quantized", f"linear_quantized, {kind}", inputs, exact, moved, 2 * s.tokens * s.width**2)


def _attention(s: Sizes, draw: Draw) -> Case:
    """Judged against its definition: float64 attention of the quantized queries and keys."""

    def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        rows = (ops.quantize_rows(x, QUANTIZED["float8"]) for x in (q, k))
        q, k = (values.double() * scales.double() for values, scales in rows)
        return (exact_attention(q, k, v),)

    inputs = lambda: draw(1, s.tokens, 3, s.heads, s.head_dim).unbind(2)
    moved, flops = 4 * s.tokens * s.width * draw.item, 4 * s.tokens**2 * s.width
    return Case("attention_fp8", "attention_fp8", inputs, exact, moved, flops)
