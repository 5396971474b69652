"""Every implementation of every op: how it is loaded, and what speaks against it on a target.

A refusal is a sentence, for the plan and for `twinflow-rt kernels`. Nothing is imported that is not asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module

import torch

from ..config import dtype_name
from . import backends, optional
from .attention import attention_fp8
from .declaration import Op
from .table import EAGER, EAGER_QUANTIZED, OpTable, QuantizedOps
from .target import Target

TRITON = (3, 6)
OLDEST_ARCH = 80
FLOAT8_ARCH = 89  # the first compute capability that stores and multiplies float8
INT8_ARCH = 80  # the first that torch._int_mm serves
RAGGED = "attention.ragged"  # attention with `lengths`: batches of prompts of several lengths
FP8 = "attention_fp8"  # attention with float8 scores, where the target asks for it
QUANTIZED_OPS = tuple(f.name for f in fields(EAGER_QUANTIZED))
CPU, GPU = ("cpu",), ("cuda",)
_MULTIPLIES_INT8 = "multiplies int8, not float8_e4m3fn"


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `refuses(target)` gives the reason why it cannot, or None; `devices` are those it is
    tried on, of the others it only says why it cannot."""

    name: str
    load: Callable[[], Op]
    refuses: Callable[[Target], str | None] = lambda target: None
    devices: tuple[str, ...] = (*CPU, *GPU)


def _cublas_refuses(target: Target) -> str | None:
    if target.device != "cuda":
        return f"runs on NVIDIA GPUs, not on {target.device}"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _folded_refuses(target: Target) -> str | None:
    return "its weights are sums of the trained ones" if target.training else None


def _triton_linear_refuses(target: Target) -> str | None:
    if target.dtype not in backends.DTYPES:
        return f"takes bfloat16 or float16, not {dtype_name(target.dtype)}"
    return triton_refuses(target)


def triton_refuses(target: Target) -> str | None:
    """Why the Triton kernels cannot serve `target` on this machine, or None."""
    if target.device != "cuda":
        return f"runs on NVIDIA GPUs, not on {target.device}"
    if target.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"stores bfloat16, float16 or float32, not {dtype_name(target.dtype)}"
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
        return f"takes bfloat16 or float16, not {dtype_name(target.dtype)}"
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
    return _older_refuses("float8", FLOAT8_ARCH, arch)


def _older_refuses(what: str, least: int, arch: int | None) -> str | None:
    if arch is not None and arch < least:
        return f"{what} needs compute capability {least / 10:.1f}, this GPU has {arch / 10:.1f}"
    return None


def _int8_mm_refuses(target: Target) -> str | None:
    if target.device not in ("cpu", "cuda"):
        return f"runs on a CPU or an NVIDIA GPU, not on {target.device}"
    if reason := _older_refuses("int8", INT8_ARCH, target.arch):
        return reason
    return _MULTIPLIES_INT8 if target.quantized == torch.float8_e4m3fn else None


def _native_quantized_refuses(target: Target) -> str | None:
    if target.device == "cpu" and target.quantized == torch.float8_e4m3fn:
        return "makes int8 rows, not float8_e4m3fn"
    return _library("refuses")(target)


def _cuda_product_refuses(target: Target) -> str | None:
    return _MULTIPLIES_INT8 if target.quantized == torch.float8_e4m3fn else _library("cuda_refuses")(target)


def _scaled_mm_refuses(target: Target) -> str | None:
    if target.device != "cuda":
        return f"runs on NVIDIA GPUs, not on {target.device}"
    if target.quantized == torch.int8:
        return "multiplies float8_e4m3fn, not int8"
    if target.dtype != torch.bfloat16:
        return f"gives bfloat16, not {dtype_name(target.dtype)}"
    if reason := _float8_refuses(target.arch):
        return reason
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _from(module: str, function: str) -> Callable[[], Op]:
    """Loads a function of a module of this package, which is imported only then."""
    return lambda: getattr(import_module(f"twinflow_rt.{module}"), function)


def _library(function: str) -> Callable[[Target], str | None]:
    return lambda target: _from("ops.native.library", function)()(target)


def _quantizing_refuses(refuses: Callable[[Target], str | None]) -> Callable[[Target], str | None]:
    """`refuses` of kernels on a GPU that quantize: float8 needs a chip that stores it."""

    def refuses_float8(target: Target) -> str | None:
        reason = _float8_refuses(target.arch) if target.quantized == torch.float8_e4m3fn else None
        return reason or refuses(target)

    return refuses_float8


# what speaks against our kernels, of each kind; against those that quantize; and against those that take less
_REFUSES = {"cuda": _library("cuda_refuses"), "triton": triton_refuses, "native": _library("refuses")}
_QUANTIZING_REFUSES = {
    "cuda": _quantizing_refuses(_library("cuda_refuses")),
    "triton": _quantizing_refuses(triton_refuses),
    "native": _native_quantized_refuses,
}
_OWN_REFUSES: dict[tuple[str, str], Callable[[Target], str | None]] = {
    ("attention", "triton"): _triton_attention_refuses,
    ("linear_attention", "triton"): _triton_linear_attention_refuses,
    ("linear_swiglu", "triton"): _triton_linear_refuses,
    ("qk_norm_rope", "cuda"): _library("cuda_rope_refuses"),
    ("joint_qk_norm_rope", "cuda"): _library("cuda_rope_refuses"),
    ("linear_quantized", "cuda"): _cuda_product_refuses,
}
# what is none of our kernels: ops of torch, of cuBLAS, of other packages
_OTHERS = {
    i.name: i
    for i in (
        Implementation("cublaslt", _from("ops.mlp", "linear_gelu_epilogue"), _cublas_refuses),
        Implementation("cublas", _from("ops.mlp", "linear_residual_epilogue"), _cublas_refuses),
        Implementation("folded", _from("ops.conv", "upsample_conv"), _folded_refuses),
        Implementation("int8-mm", _from("ops.linear", "int8_mm"), _int8_mm_refuses),
        Implementation("scaled-mm", _from("ops.linear", "scaled_mm"), _scaled_mm_refuses, GPU),
        *(Implementation(b.name, b.load, b.refuses, GPU) for b in backends.BACKENDS.values()),
    )
}


def _implementation(name: str, op: str, stem: str, eager: Op) -> Implementation:
    """The implementation `name` of `op`, whose declaration names it."""
    if name in _OTHERS:
        return _OTHERS[name]
    if name == "separate":
        return Implementation(name, lambda: eager)
    if name == "eager":
        return Implementation(name, lambda: eager, devices=())
    quantizes = op in QUANTIZED_OPS
    refuses = _OWN_REFUSES.get((op, name)) or (_QUANTIZING_REFUSES if quantizes else _REFUSES)[name]
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
    "triton": Implementation("triton", _from("kernels.attention_fp8", FP8), _triton_fp8_refuses, GPU),
    "eager": Implementation("eager", lambda: attention_fp8, devices=()),
}
IMPLEMENTATIONS |= _declared(EAGER_QUANTIZED)
