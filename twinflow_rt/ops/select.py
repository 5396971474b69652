"""Which implementation each op gets: decided once, at compile time, with every refusal stated.

`rank(op, target)` is the order of preference, a pure function. `select(target)` walks it and takes
the first implementation that does not refuse. A refusal is a sentence; the plan prints it. Nothing
falls back at call time, and nothing is imported that `target` cannot use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, optional
from .attention import attention, attention_fp8, linear_attention
from .decode import group_norm_silu, rms_norm_silu, to_uint8, upsample_conv, x0_to_vae
from .mlp import gelu_tanh, linear_gelu, linear_residual, linear_swiglu, swiglu
from .norm import layer_norm, residual_layer_norm, residual_norm, rms_norm
from .rope import joint_qk_norm_rope, qk_norm_rope
from .rows import EAGER_ROWS, Op, RowTable
from .sample import x0_project

TRITON = (3, 6)
OLDEST_ARCH = 80
FLOAT8_ARCH = 89  # the first compute capability that stores and multiplies float8
RAGGED = "attention.ragged"  # attention with `lengths`: batches of prompts of several lengths
FP8 = "attention_fp8"  # attention with float8 scores, where the target asks for it


@dataclass(frozen=True)
class Target:
    """What a program is compiled for. arch: compute capability, 90 for 9.0; None on a CPU or where
    unknown. head_dim, linear_head_dim: of softmax and of linear attention; None where unknown. rows: what
    quantized layers multiply, int8 or float8_e4m3fn; None where there are none, or unknown. fp8_attention:
    whether softmax attention may be `attention_fp8`."""

    device: str
    dtype: torch.dtype
    training: bool = False
    arch: int | None = None
    head_dim: int | None = None
    linear_head_dim: int | None = None
    rows: torch.dtype | None = None
    fp8_attention: bool = False

    @classmethod
    def of_network(cls, config: object, device: torch.device, dtype: torch.dtype) -> Target:
        """The target of a network with this config on `device` of this machine."""
        dims: dict[str, Any] = {name: getattr(config, name, None) for name in ("head_dim", "linear_head_dim")}
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
    load: Callable[[], Op]
    refuses: Callable[[Target], str | None] = lambda target: None


@dataclass(frozen=True)
class OpTable:
    """The callables a compiled network runs on; the signatures are those of the eager references."""

    rms_norm: Op
    layer_norm: Op
    residual_norm: Op
    qk_norm_rope: Op
    attention: Op
    swiglu: Op
    x0_project: Op
    to_uint8: Op
    residual_layer_norm: Op
    joint_qk_norm_rope: Op
    gelu_tanh: Op
    linear_attention: Op
    linear_swiglu: Op
    linear_gelu: Op
    linear_residual: Op
    x0_to_vae: Op
    group_norm_silu: Op
    rms_norm_silu: Op
    upsample_conv: Op


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
    linear_swiglu=linear_swiglu,
    linear_gelu=linear_gelu,
    linear_residual=linear_residual,
    x0_to_vae=x0_to_vae,
    group_norm_silu=group_norm_silu,
    rms_norm_silu=rms_norm_silu,
    upsample_conv=upsample_conv,
)


# what csrc/ has, for either device
NATIVE = (
    "rms_norm", "layer_norm", "residual_norm", "residual_layer_norm", "qk_norm_rope", "joint_qk_norm_rope", "swiglu",
    "gelu_tanh", "x0_project", "to_uint8",
)  # fmt: skip
# a product and what follows it -> the op that follows: "separate" is torch's product, then that op as chosen
SEPARATE = {"linear_swiglu": "swiglu", "linear_gelu": "gelu_tanh"}


ROW_OPS = tuple(f.name for f in fields(RowTable))
NATIVE_ROWS = tuple(op for op in ROW_OPS if op.removesuffix("_quantized") in NATIVE)  # made of those, on a CPU


def rank(op: str, target: Target) -> tuple[str, ...]:
    """Names of the implementations of `op` to try for `target`, best first; `eager` follows them all.

    op: a field of `OpTable` or `RowTable`, `RAGGED` or `FP8`. On a GPU the library compiled ahead of time (`cuda`)
    leads over Triton, which does the same work but compiles it on first use.
    """
    if op in _RANKS:
        return _RANKS[op](target) if target.device in ("cpu", "cuda") else ()
    if op == "linear_quantized":
        return {"cpu": ("int8-mm",), "cuda": ("scaled-mm",)}.get(target.device, ())
    if target.device == "cpu":
        return ("native",) if op in NATIVE or op in NATIVE_ROWS else ()
    if target.device != "cuda":
        return ()
    if op == "attention":
        return backends.order(target.arch)
    return ("cuda", "triton") if op in NATIVE else ("triton",)


def _rank_linear_swiglu(target: Target) -> tuple[str, ...]:
    """The pass that the fused product saves is 6 to 7 % of cuBLAS's time at Z-Image's sizes. Where products go
    through mma.sync (8.x, 12.x) a Triton product is about level with cuBLAS, so that is a gain; on 9.0 and 10.x,
    whose tensor cores the vendor's library feeds better, it is not. To be measured: `benches/gpu.sh`."""
    level = target.device == "cuda" and target.arch is not None and not 90 <= target.arch < 120
    return ("triton", "separate") if level else ("separate",)


# ops whose order is their own; only asked for CPUs and NVIDIA GPUs
_RANKS: dict[str, Callable[[Target], tuple[str, ...]]] = {
    "linear_swiglu": _rank_linear_swiglu,
    "linear_gelu": lambda target: ("cublaslt", "separate"),
    "linear_residual": lambda target: ("cublas",),
    "upsample_conv": lambda target: ("folded",),
    "rms_norm_silu": lambda target: ("native",) if target.device == "cpu" else ("triton",),
}


def _cublas_refuses(target: Target) -> str | None:
    if target.device != "cuda":
        return f"runs on NVIDIA GPUs, not on {target.device}"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _folded_refuses(target: Target) -> str | None:
    return "its weights are sums of the trained ones" if target.training else None


def _triton_linear_refuses(target: Target) -> str | None:
    if target.dtype not in backends.DTYPES:
        return f"takes bfloat16 or float16, not {str(target.dtype).removeprefix('torch.')}"
    return triton_refuses(target)


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


def _triton_fp8_refuses(target: Target) -> str | None:
    return _float8_refuses(target.arch) or _triton_attention_refuses(target)


def _triton_linear_attention_refuses(target: Target) -> str | None:
    if target.linear_head_dim is not None and target.linear_head_dim > 32:
        return f"takes head dims up to 32, not {target.linear_head_dim}"
    return triton_refuses(target)


def _float8_refuses(arch: int | None) -> str | None:
    if arch is not None and arch < FLOAT8_ARCH:
        return f"float8 needs compute capability 8.9, this GPU has {arch / 10:.1f}"
    return None


def _triton_rows_refuses(target: Target) -> str | None:
    reason = _float8_refuses(target.arch) if target.rows == torch.float8_e4m3fn else None
    return reason or triton_refuses(target)


def _int8_mm_refuses(target: Target) -> str | None:
    if target.device != "cpu":
        return f"runs on the CPU, not on {target.device}"
    return "multiplies int8, not float8_e4m3fn" if target.rows == torch.float8_e4m3fn else None


def _scaled_mm_refuses(target: Target) -> str | None:
    if target.device != "cuda":
        return f"runs on NVIDIA GPUs, not on {target.device}"
    if target.rows == torch.int8:
        return "multiplies float8_e4m3fn, not int8"
    if target.dtype != torch.bfloat16:
        return f"gives bfloat16, not {str(target.dtype).removeprefix('torch.')}"
    if reason := _float8_refuses(target.arch):
        return reason
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _from(module: str, op: str) -> Callable[[], Op]:
    """Loads `op` of a module of this package, which is imported only then."""
    return lambda: getattr(import_module(f"twinflow_rt.{module}"), op)


def _library(function: str) -> Callable[[Target], str | None]:
    return lambda target: _from("library", function)()(target)


# op -> what its Triton kernel refuses beyond `triton_refuses`
_TRITON_REFUSES = {
    "attention": _triton_attention_refuses,
    "linear_attention": _triton_linear_attention_refuses,
    "linear_swiglu": _triton_linear_refuses,
}
# what is neither Triton's nor of csrc/
_OTHERS = {
    "linear_swiglu": [Implementation("separate", _from("ops.mlp", "linear_swiglu"))],
    "linear_gelu": [
        Implementation("cublaslt", _from("ops.mlp", "linear_gelu_epilogue"), _cublas_refuses),
        Implementation("separate", _from("ops.mlp", "linear_gelu")),
    ],
    "linear_residual": [Implementation("cublas", _from("ops.mlp", "linear_residual_epilogue"), _cublas_refuses)],
    "upsample_conv": [Implementation("folded", _from("ops.decode", "upsample_conv"), _folded_refuses)],
    "rms_norm_silu": [Implementation("native", _from("native", "rms_norm_silu"), _library("refuses"))],
    "attention": [Implementation(b.name, b.load, b.refuses) for b in backends.BACKENDS.values()],
}
NO_TRITON = ("linear_gelu", "linear_residual", "upsample_conv")


def _implementations(op: str) -> dict[str, Implementation]:
    found = []
    if op not in NO_TRITON:
        found.append(Implementation("triton", _from("triton_ops", op), _TRITON_REFUSES.get(op, triton_refuses)))
    found += _OTHERS.get(op, [])
    if op in NATIVE:
        found.append(Implementation("native", _from("native", op), _library("refuses")))
        refuses = _library("cuda_rope_refuses" if "rope" in op else "cuda_refuses")
        found.append(Implementation("cuda", _from("native", op), refuses))
    found.append(Implementation("eager", lambda: getattr(EAGER, op)))
    return {i.name: i for i in found}


def _row_implementations(op: str) -> dict[str, Implementation]:
    found = [Implementation("triton", _from("triton_rows", op), _triton_rows_refuses)]
    if op in NATIVE_ROWS:
        found.append(Implementation("native", _from("native_rows", op), _library("refuses")))
    if op == "linear_quantized":
        found = [
            Implementation("int8-mm", _from("ops.linear", "int8_mm"), _int8_mm_refuses),
            Implementation("scaled-mm", _from("ops.linear", "scaled_mm"), _scaled_mm_refuses),
        ]
    found.append(Implementation("eager", lambda: getattr(EAGER_ROWS, op)))
    return {i.name: i for i in found}


# op -> name -> implementation
IMPLEMENTATIONS = {f.name: _implementations(f.name) for f in fields(OpTable)}
IMPLEMENTATIONS[RAGGED] = {name: IMPLEMENTATIONS["attention"][name] for name in ("triton", "eager")}
IMPLEMENTATIONS[FP8] = {
    "triton": Implementation("triton", _from("triton_rows", "attention_fp8"), _triton_fp8_refuses),
    "eager": Implementation("eager", lambda: attention_fp8),
}
IMPLEMENTATIONS |= {op: _row_implementations(op) for op in ROW_OPS}


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
    others = {*ROW_OPS, "attention", RAGGED} if target.fp8_attention else {*ROW_OPS, FP8}
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


def select_rows(target: Target, prefer: str | None = None) -> tuple[RowTable, tuple[Choice, ...]]:
    """`select` for the ops of quantized layers that multiply `target.rows`."""
    choices = [choose(op, target, prefer) for op in ROW_OPS]
    return RowTable(**{c.op: IMPLEMENTATIONS[c.op][c.chosen].load() for c in choices}), tuple(choices)


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
