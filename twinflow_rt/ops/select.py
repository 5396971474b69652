"""Which implementation each op gets: decided once, at compile time, with every refusal stated.

`select(target)` walks each op's implementations in order of priority and takes the first that does
not refuse. A refusal is a sentence; the plan prints it. Nothing falls back at call time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from types import ModuleType

import torch

from .attention import attention
from .decode import to_uint8
from .mlp import gelu_tanh, swiglu
from .norm import layer_norm, residual_layer_norm, residual_norm, rms_norm
from .rope import joint_qk_norm_rope, qk_norm_rope
from .sample import x0_project


@dataclass(frozen=True)
class Target:
    """What a program is compiled for."""

    device: str
    dtype: torch.dtype
    training: bool = False


@dataclass(frozen=True)
class Implementation:
    """One way to run an op; `refuses(target)` gives the reason why it cannot, or None."""

    name: str
    load: Callable[[], Callable]
    refuses: Callable[[Target], str | None] = lambda target: None


@dataclass(frozen=True)
class OpTable:
    """The callables a compiled network runs on; the signatures are those of the eager references."""

    rms_norm: Callable
    layer_norm: Callable
    residual_norm: Callable
    qk_norm_rope: Callable
    attention: Callable
    swiglu: Callable
    x0_project: Callable
    to_uint8: Callable
    residual_layer_norm: Callable
    joint_qk_norm_rope: Callable
    gelu_tanh: Callable


EAGER = OpTable(
    rms_norm=rms_norm,
    layer_norm=layer_norm,
    residual_norm=residual_norm,
    qk_norm_rope=qk_norm_rope,
    attention=attention,
    swiglu=swiglu,
    x0_project=x0_project,
    to_uint8=to_uint8,
    residual_layer_norm=residual_layer_norm,
    joint_qk_norm_rope=joint_qk_norm_rope,
    gelu_tanh=gelu_tanh,
)


def _native(op: str) -> Implementation:
    """The native CPU kernel of `op`; its module (and the extension) is imported when first asked for."""

    def module() -> ModuleType:
        return import_module("twinflow_rt.native")

    return Implementation("native", lambda: getattr(module(), op), lambda target: module().refuses(target))


# op -> implementations faster than eager, best first
IMPLEMENTATIONS: dict[str, list[Implementation]] = {f.name: [] for f in fields(OpTable)}
for _op in ("rms_norm", "residual_norm", "qk_norm_rope", "swiglu", "x0_project", "to_uint8"):
    IMPLEMENTATIONS[_op].append(_native(_op))


@dataclass(frozen=True)
class Choice:
    """The outcome for one op: what runs, and why each better-ranked implementation does not."""

    op: str
    chosen: str
    refused: tuple[tuple[str, str], ...] = ()


def select(target: Target) -> tuple[OpTable, tuple[Choice, ...]]:
    """Picks an implementation per op for `target`; pure but for asking what the machine has."""
    table, choices = {}, []
    for op, candidates in IMPLEMENTATIONS.items():
        chosen, refused = Implementation("eager", lambda op=op: getattr(EAGER, op)), []
        for candidate in candidates:
            reason = candidate.refuses(target)
            if reason is None:
                chosen = candidate
                break
            refused.append((candidate.name, reason))
        table[op] = chosen.load()
        choices.append(Choice(op, chosen.name, tuple(refused)))
    return OpTable(**table), tuple(choices)
