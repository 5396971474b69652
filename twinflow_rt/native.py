"""The native kernels (csrc/) as torch ops `twinflow::*`, with the signatures of the eager references.

On the CPU they are the extension `_native`; on an NVIDIA GPU the library `libtwinflow_cuda`, which a
build without nvcc leaves out. Both are loaded on first use. Where one is absent `unavailable_reason`
says why, and the op table keeps another implementation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DeviceError
from .ops.select import Target

ABI_VERSION = 2
KINDS = {torch.float32: 0, torch.bfloat16: 1}  # twinflow_dtype
CUDA_OPS = ("rms_norm", "residual_norm", "to_uint8")
CUDA_LIBRARY = Path(__file__).with_name("libtwinflow_cuda.so")

_library = torch.library.Library("twinflow", "DEF")


class CudaKernels:
    """libtwinflow_cuda's functions under the names and argument orders of `_native`; the last
    argument is a CUDA stream instead of a number of threads."""

    def __init__(self, path: Path) -> None:
        pointer, size, real, kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
        rows = [pointer, size, size]
        self._library = ctypes.CDLL(str(path))
        self.abi_version = self._library.twinflow_cuda_abi_version()
        self._message = self._library.twinflow_cuda_error_message
        self._message.restype = ctypes.c_char_p
        shape = [size, size, size, real, kind, pointer]
        self._declare("rms_norm", [*rows, pointer, size, pointer, *shape])
        self._declare("residual_norm", [*rows, *rows, *[pointer, size] * 2, pointer, pointer, *shape])
        self._declare("to_uint8", [pointer, size * 4, pointer, *[size] * 4, kind, pointer])

    def _declare(self, name: str, arguments: list[Any]) -> None:
        function = getattr(self._library, f"twinflow_cuda_{name}")
        function.argtypes, function.errcheck = arguments, self._check
        setattr(self, name, function)

    def _check(self, status: int, function: Any, arguments: Any) -> None:
        if status:
            raise RuntimeError(f"libtwinflow_cuda: {self._message(status).decode()}")


@cache
def _load(device: str) -> Any:
    """The kernels for a device type, or the reason (a str) why there are none."""
    if device == "cuda":
        if not CUDA_LIBRARY.exists():
            return "built without GPU kernels; reinstall where nvcc is on PATH (TWINFLOW_CUDA=ON insists)"
        try:
            found: Any = CudaKernels(CUDA_LIBRARY)
        except OSError as error:
            return f"the GPU kernels do not load: {error}"
    elif device == "cpu":
        try:
            from . import _native as found
        except ImportError as error:
            return f"the native extension is not built here ({error}); `pip install .` builds it"
    else:
        return f"runs on cpu and cuda, not on {device}"
    if found.abi_version != ABI_VERSION:
        return f"the native build has ABI {found.abi_version}, this package needs {ABI_VERSION}; reinstall it"
    return found


def unavailable_reason(device: str = "cpu") -> str | None:
    """Why there are no native kernels for `device` ("cpu" or "cuda") on this machine, or None."""
    found = _load(device)
    return found if isinstance(found, str) else None


def refuses(target: Target) -> str | None:
    """Why the CPU kernels cannot serve `target`, or None."""
    if target.device != "cpu":
        return f"runs on the CPU, not on {target.device}"
    return _refuses_kind(target) or unavailable_reason()


def cuda_refuses(target: Target) -> str | None:
    """Why the GPU kernels (those of `CUDA_OPS`) cannot serve `target`, or None."""
    if target.device != "cuda":
        return f"runs on NVIDIA GPUs, not on {target.device}"
    return _refuses_kind(target) or unavailable_reason("cuda")


def _refuses_kind(target: Target) -> str | None:
    if target.dtype not in KINDS:
        return f"stores float32 or bfloat16, not {str(target.dtype).removeprefix('torch.')}"
    return "has no gradient" if target.training else None


def _call(name: str, x: Tensor, *arguments: Any) -> None:
    """Runs a kernel where x lives; its dtype and the threads or the stream are the last arguments."""
    kernels = _load(x.device.type)
    if isinstance(kernels, str):
        raise DeviceError(kernels)
    kind = KINDS.get(x.dtype)
    if kind is None:
        raise TypeError(f"twinflow::{name} stores float32 or bfloat16, not {x.dtype}")
    if x.device.type == "cpu":
        getattr(kernels, name)(*arguments, kind, torch.get_num_threads())
    else:
        with torch.cuda.device(x.device):
            getattr(kernels, name)(*arguments, kind, torch.cuda.current_stream().cuda_stream)


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x [B, S, D], its batch and row strides; copied only if elements of a row are not adjacent."""
    if x.ndim != 3:
        raise ValueError(f"expected [B, S, D], got {tuple(x.shape)}")
    x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1)


def _weight(weight: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """A norm weight, [D] or [B or 1, 1, D], and the stride from one sample's to the next's (0: shared)."""
    dim, batch = x.shape[-1], x.shape[0]
    shared = weight.numel() == dim
    if weight.dtype != torch.float32 or weight.device != x.device:
        raise TypeError(f"a norm weight is float32 on {x.device}, not {weight.dtype} on {weight.device}")
    if weight.shape[-1] != dim or not (shared or weight.shape == (batch, 1, dim)):
        raise ValueError(f"a norm weight for {tuple(x.shape)} is [D] or [B or 1, 1, D], not {tuple(weight.shape)}")
    return weight.contiguous(), 0 if shared else dim


def _op(schema: str, devices: tuple[str, ...] = ("CPU",)) -> Callable:
    """Registers a function as `twinflow::<schema>` for the given devices."""
    name = schema.split("(")[0]
    _library.define(schema)

    def register(function: Callable) -> Callable:
        for device in devices:
            _library.impl(name, function, device)
        return getattr(torch.ops.twinflow, name).default

    return register


def _fake(name: str) -> Callable:
    return torch.library.register_fake(f"twinflow::{name}", lib=_library)


@_op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", ("CPU", "CUDA"))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = x.new_empty(x.shape)
    (rows, batch, row), (weight, each) = _rows(x), _weight(weight, x)
    pointers = rows.data_ptr(), batch, row, weight.data_ptr(), each, out.data_ptr()
    _call("rms_norm", x, *pointers, *x.shape, eps)
    return out


@_op("residual_norm(Tensor x, Tensor branch, Tensor post, Tensor? pre, float eps) -> Tensor[]", ("CPU", "CUDA"))
def _residual_norm(x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float) -> list[Tensor]:
    if branch.shape != x.shape or branch.dtype != x.dtype or branch.device != x.device:
        raise ValueError(f"branch must be like x: {branch.dtype} {tuple(branch.shape)}, {x.dtype} {tuple(x.shape)}")
    out = [x.new_empty(x.shape) for _ in range(1 if pre is None else 2)]
    (a, *a_strides), (b, *b_strides), (post, each_post) = _rows(x), _rows(branch), _weight(post, x)
    pre, each_pre = (None, 0) if pre is None else _weight(pre, x)
    _call(
        "residual_norm", x, a.data_ptr(), *a_strides, b.data_ptr(), *b_strides, post.data_ptr(), each_post,
        0 if pre is None else pre.data_ptr(), each_pre, out[0].data_ptr(), 0 if pre is None else out[1].data_ptr(),
        *x.shape, eps,
    )  # fmt: skip
    return out


@_op("swiglu(Tensor x) -> Tensor")
def swiglu(x: Tensor) -> Tensor:
    x, hidden = x.contiguous(), x.shape[-1] // 2
    if hidden * 2 != x.shape[-1] or not hidden:
        raise ValueError(f"swiglu halves the last axis, which has {x.shape[-1]} elements")
    out = x.new_empty((*x.shape[:-1], hidden))
    _call("swiglu", x, x.data_ptr(), out.data_ptr(), out.numel() // hidden, hidden)
    return out


@_op(
    "qk_norm_rope_(Tensor(a!) qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int heads, float eps)"
    " -> ()"
)
def _qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> None:
    batch, seq, width = qkv.shape
    dim = width // (3 * heads)
    if not qkv.is_contiguous() or dim * 3 * heads != width or dim % 2:
        raise ValueError(f"qkv must be contiguous [B, S, 3 * {heads} * even], got {tuple(qkv.shape)}")
    if any(w.shape != (dim,) for w in (q_weight, k_weight)) or cos.shape != sin.shape:
        raise ValueError(f"norm weights are [{dim}] and cos is shaped as sin")
    if cos.shape not in ((1, seq, dim // 2), (batch, seq, dim // 2)):
        raise ValueError(f"cos and sin are [{batch} or 1, {seq}, {dim // 2}], not {tuple(cos.shape)}")
    tables = [x.contiguous() for x in (q_weight, k_weight, cos, sin)]
    if any(x.dtype != torch.float32 for x in tables):
        raise TypeError("norm weights, cos and sin are float32")
    pointers = [x.data_ptr() for x in tables]
    _call("qk_norm_rope", qkv, qkv.data_ptr(), *pointers, batch, cos.shape[0], seq, heads, dim, eps)


@_op("x0_project(Tensor x, Tensor velocity, float t=1.0) -> Tensor")
def x0_project(x: Tensor, velocity: Tensor, t: float = 1.0) -> Tensor:
    if velocity.shape != x.shape or velocity.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, velocity {velocity.dtype} {tuple(velocity.shape)}")
    x, velocity = x.contiguous(), velocity.contiguous()
    out = x.new_empty(x.shape)
    _call("x0_project", x, x.data_ptr(), velocity.data_ptr(), out.data_ptr(), x.numel(), t)
    return out


@_op("to_uint8(Tensor image) -> Tensor", ("CPU", "CUDA"))
def to_uint8(image: Tensor) -> Tensor:
    batch, channels, height, width = image.shape
    out = image.new_empty((batch, height, width, channels), dtype=torch.uint8)
    strides = image.stride() if image.is_cpu else (ctypes.c_int64 * 4)(*image.stride())
    _call("to_uint8", image, image.data_ptr(), strides, out.data_ptr(), batch, channels, height, width)
    return out


@_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_fake("residual_norm")
def _(x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in range(1 if pre is None else 2)]


@_fake("swiglu")
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_fake("qk_norm_rope_")
def _(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> None:
    return None


@_fake("x0_project")
def _(x: Tensor, velocity: Tensor, t: float = 1.0) -> Tensor:
    return x.new_empty(x.shape)


@_fake("to_uint8")
def _(image: Tensor) -> Tensor:
    b, c, h, w = image.shape
    return image.new_empty((b, h, w, c), dtype=torch.uint8)


def residual_norm(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See ops/norm.py."""
    out = _residual_norm(x, branch, post, pre, eps)
    return out[0], None if pre is None else out[1]


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops/rope.py; writes q and k in place."""
    qkv = qkv.contiguous()
    _qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
    return q, k, v
