"""Which implementation each op gets: decided once, at compile time, with every refusal stated.

`rank(op, target)` is the order of preference, a pure function. `select(target)` walks it and takes
the first implementation that does not refuse. A refusal is a sentence; the plan prints it. Nothing
falls back at call time, and nothing is imported that `target` cannot use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib import import_module

import torch
from torch import Tensor

from . import backends, optional
from .attention import attention, linear_attention
from .decode import to_uint8
from .mlp import gelu_tanh, swiglu
from .norm import layer_norm, residual_layer_norm, residual_norm, rms_norm
from .rope import joint_qk_norm_rope, qk_norm_rope
from .sample import x0_project

TRITON = (3, 6)
OLDEST_ARCH = 80
RAGGED = "attention.ragged"  # attention with `lengths`: batches of prompts of several lengths


@dataclass(frozen=True)
class Target:
    """What a program is compiled for. arch: compute capability, 90 for 9.0; None on a CPU or where
    unknown. head_dim, linear_head_dim: of softmax and of linear attention; None where unknown."""

    device: str
    dtype: torch.dtype
    training: bool = False
    arch: int | None = None
    head_dim: int | None = None
    linear_head_dim: int | None = None

    @classmethod
    def of_network(cls, config: object, device: torch.device, dtype: torch.dtype) -> Target:
        """The target of a network with this config on `device` of this machine."""
        dims = {name: getattr(config, name, None) for name in ("head_dim", "linear_head_dim")}
        return replace(cls.of(device, dtype), **dims)

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> Target:
        """The target that `device` of this machine is."""
        arch = None
        if device.type == "cuda" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(device)
            arch = 10 * major + minor
        return cls(device.type, dtype, arch=arch, head_dim=head_dim)


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
    linear_attention: Callable


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
    linear_attention=linear_attention,
)


# what csrc/ has, for either device
NATIVE = (
    "rms_norm", "layer_norm", "residual_norm", "residual_layer_norm", "qk_norm_rope", "joint_qk_norm_rope", "swiglu",
    "gelu_tanh", "x0_project", "to_uint8",
)  # fmt: skip


def rank(op: str, target: Target) -> tuple[str, ...]:
    """Names of the implementations of `op` to try for `target`, best first; `eager` follows them all.

    op: a field of `OpTable`, or `RAGGED`. On a GPU the library compiled ahead of time (`cuda`) leads
    over Triton, which does the same work but compiles it on first use.
    """
    if target.device == "cpu":
        return ("native",) if op in NATIVE else ()
    if target.device != "cuda":
        return ()
    if op == "attention":
        return backends.order(target.arch)
    return ("cuda", "triton") if op in NATIVE else ("triton",)


def triton_refuses(target: Target) -> str | None:
    """Why the Triton kernels cannot serve `target` on this machine, or None."""
    if target.device != "cuda":
        return f"runs on NVIDIA GPUs, not on {target.device}"
    if target.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"stores bfloat16, float16 or float32, not {str(target.dtype).removeprefix('torch.')}"
    if target.training:
        return "has no gradient"
    if target.arch is not None and target.arch < OLDEST_ARCH:
        return f"needs compute capability 8.0 or newer, this GPU has {target.arch / 10:.1f}"
    package = optional.find("triton")
    if package.problem is None and optional.older(package.version, TRITON):
        return f"triton {package.version} is older than {'.'.join(map(str, TRITON))}"
    if package.problem is None and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return package.problem


def _triton_attention_refuses(target: Target) -> str | None:
    if target.dtype not in backends.DTYPES:
        return f"takes bfloat16 or float16, not {str(target.dtype).removeprefix('torch.')}"
    if target.head_dim is not None and target.head_dim > 256:
        return f"takes head dims up to 256, not {target.head_dim}"
    return triton_refuses(target)


def _triton_linear_attention_refuses(target: Target) -> str | None:
    if target.linear_head_dim is not None and target.linear_head_dim > 32:
        return f"takes head dims up to 32, not {target.linear_head_dim}"
    return triton_refuses(target)


def _from(module: str, op: str) -> Callable[[], Callable]:
    """Loads `op` of a module of this package, which is imported only then."""
    return lambda: getattr(import_module(f"twinflow_rt.{module}"), op)


def _library(function: str) -> Callable[[Target], str | None]:
    return lambda target: _from("library", function)()(target)


def _implementations(op: str) -> dict[str, Implementation]:
    special = {"attention": _triton_attention_refuses, "linear_attention": _triton_linear_attention_refuses}
    found = [Implementation("triton", _from("triton_ops", op), special.get(op, triton_refuses))]
    if op == "attention":
        found += [Implementation(b.name, b.load, b.refuses) for b in backends.BACKENDS.values()]
    if op in NATIVE:
        found.append(Implementation("native", _from("native", op), _library("refuses")))
        refuses = _library("cuda_rope_refuses" if "rope" in op else "cuda_refuses")
        found.append(Implementation("cuda", _from("native", op), refuses))
    found.append(Implementation("eager", lambda: getattr(EAGER, op)))
    return {i.name: i for i in found}


# op -> name -> implementation
IMPLEMENTATIONS = {f.name: _implementations(f.name) for f in fields(OpTable)}
IMPLEMENTATIONS[RAGGED] = {name: IMPLEMENTATIONS["attention"][name] for name in ("triton", "eager")}


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
    choices = [choose(op, target, prefer) for op in IMPLEMENTATIONS]
    table = {c.op: IMPLEMENTATIONS[c.op][c.chosen].load() for c in choices}
    ragged = table.pop(RAGGED)
    if ragged is not table["attention"]:
        table["attention"] = _by_lengths(table["attention"], ragged)
    return OpTable(**table), tuple(choices)


def _by_lengths(dense: Callable, ragged: Callable) -> Callable:
    """Attention of two implementations: most backends serve dense batches only."""

    def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
        return dense(q, k, v) if lengths is None else ragged(q, k, v, lengths)

    return attention
