"""Every implementation of every op: how it is loaded, and what speaks against it on a target.

A refusal is a sentence, for the plan and for `twinflow-rt kernels`. Nothing is imported that is not asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module

import torch

from . import backends, optional
from .attention import attention_fp8
from .declaration import Op
from .int4 import Int4Ops
from .linear import sums_int8
from .native import library
from .nvfp4 import Nvfp4Ops
from .table import EAGER, EAGER_QUANTIZED, OpTable, QuantizedOps
from .target import Refusal, Target, either, in_training, larger_heads, no_gpu, off_gpu, other_dtype

TRITON = (3, 6)
OLDEST_ARCH = 80
FLOAT8_ARCH = 89  # the first compute capability that stores and multiplies float8
INT8_ARCH = 80  # the first that torch._int_mm serves
RAGGED = "attention.ragged"  # attention with `lengths`: batches of prompts of several lengths
FP8 = "attention_fp8"  # attention with float8 scores, where the target asks for it
FOUR_BIT_OPS = tuple(f.name for f in (*fields(Int4Ops), *fields(Nvfp4Ops)))
QUANTIZED_OPS = tuple(f.name for f in fields(EAGER_QUANTIZED) if f.name not in FOUR_BIT_OPS)  # of weights of 8 bits
CPU, GPU = ("cpu",), ("cuda",)


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `refuses(target)` gives the reason why it cannot, or None; `devices` are those it is
    tried on, of the others it only says why it cannot."""

    name: str
    load: Callable[[], Op]
    refuses: Refusal = lambda target: None
    devices: tuple[str, ...] = (*CPU, *GPU)


def _from(module: str, function: str) -> Callable[[], Op]:
    """Loads a function of a module of this package, which is imported only then."""
    return lambda: getattr(import_module(f"twinflow_rt.{module}"), function)


def _older(words: str, least: int) -> Refusal:
    """`words` say what needs the compute capability `least`."""
    return lambda target: (
        f"{words}, this GPU has {target.arch / 10:.1f}" if target.arch is not None and target.arch < least else None
    )


def _given(quantized: torch.dtype, refuses: Refusal | str, device: str | None = None) -> Refusal:
    """What speaks against targets whose layers multiply `quantized`, on `device` or any: a refusal or a sentence."""

    def refusal(target: Target) -> str | None:
        if target.quantized != quantized or device not in (None, target.device):
            return None
        return refuses if isinstance(refuses, str) else refuses(target)

    return refusal


def _off_cpu_and_gpu(target: Target) -> str | None:
    known = target.device in ("cpu", "cuda")
    return None if known else f"runs on a CPU or an NVIDIA GPU, not on {target.device}"


_FLOAT8 = torch.float8_e4m3fn
_older_than_float8 = _older("float8 needs compute capability 8.9", FLOAT8_ARCH)
_int8_only = _given(_FLOAT8, "multiplies int8, not float8_e4m3fn")
_triton = either(
    off_gpu,
    other_dtype("stores bfloat16, float16 or float32", torch.bfloat16, torch.float16, torch.float32),
    in_training,
    _older("needs compute capability 8.0 or newer", OLDEST_ARCH),
    lambda target: optional.absent("triton", TRITON),
    no_gpu,
)
_triton_attention = either(backends.other_than_half, larger_heads(256), _triton)
_triton_float8_attention = either(_older_than_float8, _triton_attention)
_cuda_rope = either(larger_heads(256), library.cuda_refuses)
_off_12 = lambda t: None if (t.arch or 120) // 10 == 12 else f"needs compute capability 12.0, this has {t.arch / 10}"
# what speaks against our kernels, of each kind; against those that quantize; and against those that take less
_REFUSES = {"cuda": library.cuda_refuses, "triton": _triton, "native": library.refuses}
_QUANTIZING_REFUSES = {
    "cuda": either(_given(_FLOAT8, _older_than_float8), library.cuda_refuses),
    "triton": either(_given(_FLOAT8, _older_than_float8), _triton),
    "native": either(_given(_FLOAT8, "makes int8 rows, not float8_e4m3fn", "cpu"), library.refuses),
}
_OWN_REFUSES: dict[tuple[str, str], Refusal] = {
    ("attention", "triton"): _triton_attention,
    ("linear_attention", "triton"): either(larger_heads(32, "linear_head_dim"), _triton),
    ("linear_swiglu", "triton"): either(backends.other_than_half, _triton),
    ("linear_w4a16", "triton"): either(backends.other_than_half, _triton),
    ("linear_nvfp4", "triton"): either(other_dtype("gives bfloat16", torch.bfloat16), _off_12, _triton),
    ("qk_norm_rope", "cuda"): _cuda_rope,
    ("joint_qk_norm_rope", "cuda"): _cuda_rope, ("linear_quantized", "cuda"): either(_int8_only, library.cuda_refuses),
}  # fmt: skip
_cublas = either(off_gpu, no_gpu)
_folded = lambda target: "its weights are sums of the trained ones" if target.training else None
_saturating = lambda t: "8-bit products saturate: no VNNI" if t.device == "cpu" and not sums_int8() else None
_int8_mm = either(_off_cpu_and_gpu, _saturating, _older("int8 needs compute capability 8.0", INT8_ARCH), _int8_only)
_scaled_mm = either(
    off_gpu, _given(torch.int8, "multiplies float8_e4m3fn, not int8"),
    other_dtype("gives bfloat16", torch.bfloat16), _older_than_float8, no_gpu,
)  # fmt: skip
# what is none of our kernels: ops of torch, of cuBLAS, of other packages
_OTHERS = {
    i.name: i
    for i in (
        Implementation("cublaslt", _from("ops.mlp", "linear_gelu_epilogue"), _cublas),
        Implementation("cublas", _from("ops.mlp", "linear_residual_epilogue"), _cublas),
        Implementation("folded", _from("ops.conv", "upsample_conv"), _folded),
        Implementation("int8-mm", _from("ops.linear", "int8_mm"), _int8_mm),
        Implementation("scaled-mm", _from("ops.linear", "scaled_mm"), _scaled_mm, GPU),
        *(Implementation(b.name, b.load, b.refuses, GPU) for b in backends.BACKENDS.values()),
    )
}


def _implementation(name: str, op: str, stem: str, eager: Op) -> Implementation:
    """The implementation `name` of `op`, whose declaration names it."""
    if name in _OTHERS:
        return _OTHERS[name]
    if name in ("separate", "eager"):  # eager is tried nowhere: it remains
        return Implementation(name, lambda: eager, devices=() if name == "eager" else (*CPU, *GPU))
    refuses = _OWN_REFUSES.get((op, name)) or (_QUANTIZING_REFUSES if op in QUANTIZED_OPS else _REFUSES)[name]
    package = "kernels" if name == "triton" else "ops.native"
    return Implementation(name, _from(f"{package}.{stem}", op), refuses, CPU if name == "native" else GPU)


def _declared(table: OpTable | QuantizedOps) -> dict[str, dict[str, Implementation]]:
    """op -> name -> implementation, of the fields of an op table that has its defaults; `eager` comes last."""
    return {
        f.name: {
            name: _implementation(name, f.name, f.metadata["stem"], getattr(table, f.name))
            for name in (*f.metadata["implementations"], "eager")
        }
        for f in fields(table)
    }


# op -> name -> implementation, best first
IMPLEMENTATIONS = _declared(EAGER)
IMPLEMENTATIONS[RAGGED] = {name: IMPLEMENTATIONS["attention"][name] for name in ("triton", "eager")}
IMPLEMENTATIONS[FP8] = {
    "triton": Implementation("triton", _from("kernels.attention_fp8", FP8), _triton_float8_attention, GPU),
    "eager": Implementation("eager", lambda: attention_fp8, devices=()),
}
IMPLEMENTATIONS |= _declared(EAGER_QUANTIZED)
