"""Which implementation each op gets: decided once, at compile time, with every refusal stated.

`rank(op, target)` is the order of preference, a pure function. `select(target)` walks it and takes
the first implementation that does not refuse. A refusal is a sentence; the plan prints it. Nothing
falls back at call time, and nothing is imported that `target` cannot use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import backends
from .declaration import Op
from .implementations import FOUR_BIT_OPS, FP8, IMPLEMENTATIONS, QUANTIZED_OPS, RAGGED
from .table import OpTable, QuantizedOps
from .target import Target

# a product and what follows it -> the op that follows: "separate" is torch's product, then that op as chosen
SEPARATE = {"linear_swiglu": "swiglu", "linear_gelu": "gelu_tanh"}


def rank(op: str, target: Target) -> tuple[str, ...]:
    """Names of the implementations of `op` to try for `target`, best first; `eager` follows them all.

    op: a key of `IMPLEMENTATIONS`. The order is that of the op's declaration, but for the ops whose best
    implementation depends on the GPU. There the library compiled ahead of time (`cuda`) leads over Triton, which does
    the same work but compiles it on first use.
    """
    if target.device == "cuda" and op in _GPU_RANKS:
        return _GPU_RANKS[op](target.arch)
    return tuple(i.name for i in IMPLEMENTATIONS[op].values() if target.device in i.devices)


# linear_swiglu: the pass that the fused product saves is a small part of the product's own time. Where products go
# through mma.sync (8.x, 12.x) Triton's are about level with cuBLAS's, so the pass decides; on 9.0 and 10.x the vendor's
# library feeds the tensor cores better than that. Judged, not measured: `benches/gpu.sh OUT layers-z-image`.
_GPU_RANKS: dict[str, Callable[[int | None], tuple[str, ...]]] = {
    "attention": backends.order,
    "linear_swiglu": lambda arch: ("separate",) if arch is None or 90 <= arch < 120 else ("triton", "separate"),
}


@dataclass(frozen=True)
class Choice:
    """The outcome for one op: what runs, and why each better-ranked implementation does not."""

    op: str
    chosen: str
    refused: tuple[tuple[str, str], ...] = ()


def choose(op: str, target: Target, prefer: str | None = None) -> Choice:
    """The best-ranked implementation of `op` that serves `target` on this machine; `prefer` leads the rank
    of every op that has an implementation of that name."""
    refused: list[tuple[str, str]] = []
    first = (prefer,) if prefer in IMPLEMENTATIONS[op] else ()
    for name in dict.fromkeys((*first, *rank(op, target))):
        reason = IMPLEMENTATIONS[op][name].refuses(target)
        if reason is None:
            return Choice(op, name, tuple(refused))
        refused.append((name, reason))
    return Choice(op, "eager", tuple(refused))


def select(target: Target, prefer: str | None = None) -> tuple[OpTable, tuple[Choice, ...]]:
    """Picks an implementation per op for `target` (see `choose`); pure but for asking what the machine has."""
    others = {*QUANTIZED_OPS, *FOUR_BIT_OPS, *(("attention", RAGGED) if target.fp8_attention else (FP8,))}
    choices = [choose(op, target, prefer) for op in IMPLEMENTATIONS if op not in others]
    table = {c.op: IMPLEMENTATIONS[c.op][c.chosen].load() for c in choices}
    if target.fp8_attention:
        table["attention"] = table.pop(FP8)
    elif (ragged := table.pop(RAGGED)) is not table["attention"]:
        table["attention"] = _by_lengths(table["attention"], ragged)
    for choice in choices:
        if choice.chosen == "separate":
            table[choice.op] = _separately(table[SEPARATE[choice.op]])
    return OpTable(**table), tuple(choices)


def select_quantized(target: Target, prefer: str | None = None) -> tuple[QuantizedOps, tuple[Choice, ...]]:
    """`select` for the ops of quantized layers that multiply `target.quantized`, and of those of 4 bits."""
    choices = [choose(op, target, prefer) for op in (*QUANTIZED_OPS, *FOUR_BIT_OPS)]
    return QuantizedOps(**{c.op: IMPLEMENTATIONS[c.op][c.chosen].load() for c in choices}), tuple(choices)


@cache
def _separately(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A linear layer and an activation, one after the other."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return activation(F.linear(x, weight, bias))

    return linear


def _by_lengths(dense: Op, ragged: Op) -> Op:
    """Attention of two implementations: most backends serve dense batches only."""

    def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Any:
        return dense(q, k, v) if lengths is None else ragged(q, k, v, lengths)

    return attention
