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
from .rows import EAGER_ROWS, RowTable
from .table import EAGER, Op, OpTable
from .target import Target

TRITON = (3, 6)
OLDEST_ARCH = 80
FLOAT8_ARCH = 89  # the first compute capability that stores and multiplies float8
INT8_ARCH = 80  # the first that torch._int_mm serves
RAGGED = "attention.ragged"  # attention with `lengths`: batches of prompts of several lengths
FP8 = "attention_fp8"  # attention with float8 scores, where the target asks for it

# what csrc/ has, for either device
NATIVE = (
    "rms_norm", "layer_norm", "residual_norm", "residual_layer_norm", "qk_norm_rope", "joint_qk_norm_rope", "swiglu",
    "gelu_tanh", "x0_project", "to_uint8",
)  # fmt: skip
_MULTIPLIES_INT8 = "multiplies int8, not float8_e4m3fn"
# a product and what follows it -> the op that follows: "separate" is torch's product, then that op as chosen
SEPARATE = {"linear_swiglu": "swiglu", "linear_gelu": "gelu_tanh"}
NO_TRITON = ("linear_gelu", "linear_residual", "upsample_conv", "grouped_qk_norm_rope")
ROW_OPS = tuple(f.name for f in fields(RowTable))


@dataclass(frozen=True)
class Implementation:
    """One way to run an op; `refuses(target)` gives the reason why it cannot, or None."""

    name: str
    load: Callable[[], Op]
    refuses: Callable[[Target], str | None] = lambda target: None


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


def _rows_refuse(refuses: Callable[[Target], str | None]) -> Callable[[Target], str | None]:
    """`refuses` of kernels on a GPU that make quantized rows: float8 needs a chip that stores it."""

    def of_rows(target: Target) -> str | None:
        reason = _float8_refuses(target.arch) if target.rows == torch.float8_e4m3fn else None
        return reason or refuses(target)

    return of_rows


def _int8_mm_refuses(target: Target) -> str | None:
    if target.device not in ("cpu", "cuda"):
        return f"runs on a CPU or an NVIDIA GPU, not on {target.device}"
    if reason := _older_refuses("int8", INT8_ARCH, target.arch):
        return reason
    return _MULTIPLIES_INT8 if target.rows == torch.float8_e4m3fn else None


def _native_rows_refuses(target: Target) -> str | None:
    if target.device == "cpu" and target.rows == torch.float8_e4m3fn:
        return "makes int8 rows, not float8_e4m3fn"
    return _library("refuses")(target)


def _cuda_product_refuses(target: Target) -> str | None:
    return _MULTIPLIES_INT8 if target.rows == torch.float8_e4m3fn else _library("cuda_refuses")(target)


def _scaled_mm_refuses(target: Target) -> str | None:
    if target.device != "cuda":
        return f"runs on NVIDIA GPUs, not on {target.device}"
    if target.rows == torch.int8:
        return "multiplies float8_e4m3fn, not int8"
    if target.dtype != torch.bfloat16:
        return f"gives bfloat16, not {dtype_name(target.dtype)}"
    if reason := _float8_refuses(target.arch):
        return reason
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _from(module: str, op: str) -> Callable[[], Op]:
    """Loads `op` of a module of this package, which is imported only then."""
    return lambda: getattr(import_module(f"twinflow_rt.{module}"), op)


def _library(function: str) -> Callable[[Target], str | None]:
    return lambda target: _from("ops.native.library", function)()(target)


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
    **{
        op: [Implementation("native", _from("ops.native.plain", op), _library("refuses"))]
        for op in ("grouped_qk_norm_rope", "group_norm_silu", "rms_norm_silu")
    },
    "attention": [Implementation(b.name, b.load, b.refuses) for b in backends.BACKENDS.values()],
}

def _implementations(op: str) -> dict[str, Implementation]:
    found = []
    if op not in NO_TRITON:
        found.append(Implementation("triton", _from("ops.triton.plain", op), _TRITON_REFUSES.get(op, triton_refuses)))
    found += _OTHERS.get(op, [])
    if op in NATIVE:
        found.append(Implementation("native", _from("ops.native.plain", op), _library("refuses")))
        refuses = _library("cuda_rope_refuses" if "rope" in op else "cuda_refuses")
        found.append(Implementation("cuda", _from("ops.native.plain", op), refuses))
    found.append(Implementation("eager", lambda: getattr(EAGER, op)))
    return {i.name: i for i in found}


def _row_implementations(op: str) -> dict[str, Implementation]:
    native = _from("ops.native.rows", op)
    if op == "linear_quantized":
        found = [
            Implementation("int8-mm", _from("ops.linear", "int8_mm"), _int8_mm_refuses),
            Implementation("scaled-mm", _from("ops.linear", "scaled_mm"), _scaled_mm_refuses),
            Implementation("cuda", native, _cuda_product_refuses),
        ]
    else:
        found = [
            Implementation("triton", _from("ops.triton.rows", op), _rows_refuse(triton_refuses)),
            Implementation("cuda", native, _rows_refuse(_library("cuda_refuses"))),
        ]
    found.append(Implementation("native", native, _native_rows_refuses))
    found.append(Implementation("eager", lambda: getattr(EAGER_ROWS, op)))
    return {i.name: i for i in found}


# op -> name -> implementation
IMPLEMENTATIONS = {f.name: _implementations(f.name) for f in fields(OpTable)}
IMPLEMENTATIONS[RAGGED] = {name: IMPLEMENTATIONS["attention"][name] for name in ("triton", "eager")}
IMPLEMENTATIONS[FP8] = {
    "triton": Implementation("triton", _from("ops.triton.rows", "attention_fp8"), _triton_fp8_refuses),
    "eager": Implementation("eager", lambda: attention_fp8),
}
IMPLEMENTATIONS |= {op: _row_implementations(op) for op in ROW_OPS}
