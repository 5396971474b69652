"""The ops of quantized networks, at their networks' sizes: as `op_cases`, for `QuantizedOps` and float8 attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benches.ops.case import Case, Draw, Sizes, exact_attention
from benches.ops.op_cases import cases
from twinflow_rt import ops
from twinflow_rt.ops import Target
from twinflow_rt.ops.declaration import Op
from twinflow_rt.ops.implementations import IMPLEMENTATIONS, QUANTIZED_OPS
from twinflow_rt.ops.int4 import CHUNK, quantize_int4, row_units, widen
from twinflow_rt.ops.nvfp4 import dequantize_nvfp4, quantize_nvfp4

QUANTIZED = {"float8": torch.float8_e4m3fn, "int8": torch.int8}
# ops whose results a linear layer multiplies
PRODUCERS = ("rms_norm", "layer_norm", "residual_norm", "residual_layer_norm", "swiglu", "gelu_tanh")


def implementations(case: Case, target: Target, key: str | None = None) -> tuple[dict[str, Op], dict[str, str]]:
    """Return the implementations that serve the case on `target` here, and why the others do not.

    key: the case's in `IMPLEMENTATIONS`, if not its op.
    """
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
    """Return `target` for networks quantized as the case is, for a case of `QUANTIZED_OPS`."""
    kind = case.name.rpartition(", ")[2]
    return replace(target, quantized=QUANTIZED[kind]) if case.op in QUANTIZED_OPS else target


def eight_bit_cases(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> list[Case]:
    """Return a case per op, for those that quantize one of float8 and one of int8."""
    draw, plain = Draw(dtype, torch.device(device)), {case.op: case for case in cases(sizes, dtype, device)}
    rows = [
        case
        for kind in QUANTIZED
        for case in (
            _quantize_rows(sizes, draw, kind),
            *(_quantizing(plain[op], sizes, draw, kind) for op in PRODUCERS),
            _product(sizes, draw, kind),
        )
    ]
    return [*rows, _attention(sizes, draw), *_four_bit(sizes, draw), _nvfp4(sizes, draw)]


def dequantized(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return (..., values * scales) for (..., values, scales): what a matrix product will see."""
    *before, values, scales = result
    return (*before, values.float() * scales)


def _quantize_rows(s: Sizes, draw: Draw, kind: str) -> Case:
    inputs = lambda: (draw(1, s.tokens, s.width), QUANTIZED[kind])
    moved = s.tokens * s.width * (draw.item + 1)
    exact = lambda x, _: (x.double(),)
    return Case("quantize_rows", f"quantize_rows, {kind}", inputs, exact, moved, read=dequantized)


def _quantizing(case: Case, s: Sizes, draw: Draw, kind: str) -> Case:
    """Return the case of an op that quantizes what the op of `case` returns last: the same inputs, fewer bytes."""
    written = s.tokens * (s.hidden if case.op in ("swiglu", "gelu_tanh") else s.width)
    return replace(
        case, op=f"{case.op}_quantized", name=f"{case.op}_quantized, {kind}",
        inputs=lambda: (*case.inputs(), QUANTIZED[kind]), exact=lambda *args: case.exact(*args[:-1]),
        bytes=case.bytes - written * (draw.item - 1), read=dequantized,
    )  # fmt: skip


def _product(s: Sizes, draw: Draw, kind: str) -> Case:
    def inputs() -> tuple[Any, ...]:
        weight = draw(s.width, s.width, seed=1) * s.width**-0.5
        rows = (ops.quantize_rows(x, QUANTIZED[kind]) for x in (draw(1, s.tokens, s.width), weight))
        return *(part for pair in rows for part in pair), draw(s.width, seed=2), draw.dtype

    def exact(x: Tensor, scales: Tensor, w: Tensor, w_scales: Tensor, bias: Tensor, _: torch.dtype) -> tuple[Tensor]:
        return (x.double() * scales.double() @ (w.double() * w_scales.double()).t() + bias.double(),)

    moved = s.tokens * s.width * (1 + draw.item) + s.width**2
    return Case("linear_quantized", f"linear_quantized, {kind}", inputs, exact, moved, 2 * s.tokens * s.width**2)


def _four_bit(s: Sizes, draw: Draw) -> list[Case]:
    """Return the cases of a block's products with weights of 4 bits, groups of 64, whose minimums the second has."""
    width, hidden = (-(-n // CHUNK) * CHUNK for n in (s.width, s.hidden))
    shapes = {"qkv": (3 * width, width), "out": (width, width), "w13": (2 * hidden, width), "w2": (width, hidden)}

    def case(op: str, name: str) -> Case:
        n, k = shapes[name]

        def inputs() -> tuple[Any, ...]:
            weight = quantize_int4(draw(n, k, seed=1, dtype=torch.float32) * k**-0.5, CHUNK)
            if name == "out":
                weight = weight._replace(group_minimums=(7.5 * weight.group_scales.float()).half())
            x, bias = draw(1, s.tokens, k), draw(n, seed=2)
            if op == "linear_w4a16":
                return x, *weight, bias
            return *ops.quantize_rows(x, torch.int8), *weight, bias, draw.dtype

        def exact(x: Tensor, *rest: Any) -> tuple[Tensor]:
            x_scales, *weight, bias = rest[:-1] if op == "linear_w4a8" else (1, *rest)
            units = widen(*weight[:3]) if op == "linear_w4a8" else row_units(*weight[:3])
            return ((x.double() * x_scales) @ (units.double() * weight[3].double()).t() + bias.double(),)

        moved = s.tokens * ((1 if op == "linear_w4a8" else draw.item) * k + n * draw.item) + n * k * 17 // 32
        return Case(op, f"{op}, {name}", inputs, exact, moved, 2 * s.tokens * n * k)

    return [case(op, name) for op in ("linear_w4a8", "linear_w4a16") for name in shapes]


def _nvfp4(s: Sizes, draw: Draw) -> Case:
    """Return the case of a layer in 4-bit floats, judged by float64 arithmetic of what x and the weight become."""
    k = -(-s.width // CHUNK) * CHUNK

    def inputs() -> tuple[Any, ...]:
        weight = quantize_nvfp4(draw(s.width, k, seed=1, dtype=torch.float32) * k**-0.5)
        return draw(1, s.tokens, k), *weight, draw(s.width, seed=2)

    def exact(x: Tensor, *rest: Any) -> tuple[Tensor]:
        rows, weight = (dequantize_nvfp4(*some).double() for some in (quantize_nvfp4(x), rest[:4]))
        return ((rows @ weight.t() + rest[4].double()).view(*x.shape[:-1], -1),)

    moved, flops = s.tokens * (k + s.width) * draw.item + s.width * k * 9 // 16, 2 * s.tokens * k * s.width
    return Case("linear_nvfp4", "linear_nvfp4", inputs, exact, moved, flops)


def _attention(s: Sizes, draw: Draw) -> Case:
    """Return the case of float8 attention, judged by its definition: float64 attention of the quantized queries and
    keys."""

    def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        rows = (ops.quantize_rows(x, QUANTIZED["float8"]) for x in (q, k))
        q, k = (values.double() * scales.double() for values, scales in rows)
        return (exact_attention(q, k, v),)

    inputs = lambda: draw(1, s.tokens, 3, s.heads, s.head_dim).unbind(2)
    moved, flops = 4 * s.tokens * s.width * draw.item, 4 * s.tokens**2 * s.width
    return Case("attention_fp8", "attention_fp8", inputs, exact, moved, flops)
