"""How a native kernel becomes a torch op `twinflow::*`: its registration, its call, its arguments from tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ...errors import DeviceError
from ...host_memory import HUGE, prefer_huge_pages
from ..tracing import watched
from . import library
from .library import KINDS

Function = Callable[..., Any]

PLAIN: dict[Any, Function] = {}  # a registered op -> what computes it, without torch's dispatcher
_torch_library = torch.library.Library("twinflow", "DEF")


def run(name: str, x: Tensor, *arguments: Any) -> None:
    """Runs a kernel where x lives; its dtype and the threads or the stream are the last arguments."""
    kernels = kernels_of(x)
    if isinstance(kernels, str):
        raise DeviceError(kernels)
    kind = KINDS.get(x.dtype)
    if kind is None:
        raise TypeError(f"twinflow::{name} stores float32 or bfloat16, not {x.dtype}")
    if x.is_cpu:
        getattr(kernels, name)(*arguments, kind, torch.get_num_threads())
    else:
        with torch.cuda.device(x.device):
            getattr(kernels, name)(*arguments, kind, torch.cuda.current_stream().cuda_stream)


def kernels_of(x: Tensor) -> Any:
    """The kernels where x lives, or why there are none."""
    return library.load("cpu" if x.is_cpu else x.device.type)  # a device's name takes as long as a few arguments


def as_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x as [B, S, D], its batch and row strides; copied only if elements of a row are not adjacent."""
    if x.ndim != 3:
        x = x.reshape(x.shape[0] if x.ndim > 3 else 1, -1, x.shape[-1])
    batch, row, element = x.stride()
    if element != 1 and x.shape[2] != 1:
        x = x.contiguous()
        batch, row, _ = x.stride()
    return x, batch, row


def fresh(x: Tensor) -> Tensor:
    """Contiguous room for a tensor like x; `new_empty` takes twice as long."""
    return roomy(torch.empty_like(x, memory_format=torch.contiguous_format))


def roomy(fresh: Tensor) -> Tensor:
    """A tensor that was just allocated, in huge pages where it is large and the CPU's."""
    if (nbytes := fresh.nbytes) >= HUGE and fresh.is_cpu:
        prefer_huge_pages(fresh.data_ptr(), nbytes)
    return fresh


def same(name: str, x: Tensor, other: Tensor) -> None:
    if other.shape != x.shape or other.dtype != x.dtype or other.device != x.device:
        raise ValueError(f"{name} must be like x: {other.dtype} {tuple(other.shape)}, {x.dtype} {tuple(x.shape)}")


def weight_of(weight: Tensor | None, x: Tensor) -> tuple[Tensor | None, int, int]:
    """A weight, [D] or [B or 1, 1, D] or None; its address, and the stride between samples (0: shared)."""
    if weight is None:
        return None, 0, 0
    shape, of_weight = x.shape, weight.shape
    dim = shape[-1]
    if weight.dtype != torch.float32 or weight.device != x.device:
        raise TypeError(f"a norm weight is float32 on {x.device}, not {weight.dtype} on {weight.device}")
    shared = weight.numel() == dim
    if of_weight[-1] != dim or not (shared or (len(shape) == 3 and of_weight == (shape[0], 1, dim))):
        raise ValueError(f"a norm weight for {tuple(shape)} is [D] or [B or 1, 1, D], not {tuple(of_weight)}")
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    return weight, weight.data_ptr(), 0 if shared else weight.stride(0)


def op(schema: str) -> Callable[[Function], Function]:
    """Registers a function as `twinflow::<schema>` for both devices, and returns what calls it: at once, unless
    torch must see the op. Its dispatcher takes as long as a small kernel."""
    name = schema.split("(")[0]
    _torch_library.define(schema)

    def register(function: Function) -> Function:
        for device in ("CPU", "CUDA"):
            _torch_library.impl(name, function, device)
        dispatched: Function = getattr(torch.ops.twinflow, name).default
        PLAIN[dispatched] = function

        @wraps(function)
        def call(first: Any, *others: Any) -> Any:
            x = first if isinstance(first, Tensor) else first[0]
            seen = type(x) is not Tensor or x.is_meta or watched()  # tensors may stand for others: meta and fake ones
            return (dispatched if seen else function)(first, *others)

        return call

    return register


def fake(*names: str) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        for name in names:
            torch.library.register_fake(f"twinflow::{name}", function, lib=_torch_library)
        return function

    return register


def halves(x: Tensor) -> tuple[Tensor, int]:
    """x, contiguous, and the size of the halves of its last axis."""
    hidden = x.shape[-1] // 2
    if hidden * 2 != x.shape[-1] or not hidden:
        raise ValueError(f"swiglu halves the last axis, which has {x.shape[-1]} elements")
    return x.contiguous(), hidden
