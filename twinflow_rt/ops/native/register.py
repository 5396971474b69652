"""How a native kernel becomes a torch op `twinflow::*`: its registration, its call, its arguments from tensors.

On the CPU the ops run in the extension `_native`, on an NVIDIA GPU in `libtwinflow_cuda` (library.py). Where one is
absent they raise DeviceError, and the op table keeps another implementation.

A struct of csrc/include/twinflow_rt.h is a tuple of its fields here; a tensor behind them keeps their memory alive.
"""

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
from .library import DTYPES, FORMATS

Function = Callable[..., Any]
Pair = tuple[Tensor, Tensor]
Rows = tuple[int, int, int, Tensor]  # twinflow_rows
Weights = tuple[int, int, Tensor] | tuple[int, int]  # twinflow_weights
Out = tuple[int, int, int]  # twinflow_out

PLAIN: dict[Any, Function] = {}  # a registered op -> what computes it, without torch's dispatcher
_libraries: dict[str, torch.library.Library] = {}  # torch's, one for each op


def op(schema: str, result: Function) -> Callable[[Function], Function]:
    """Register a function as `twinflow::<schema>` for both devices, and return what calls it: at once, unless torch
    must see the op. Its dispatcher takes as long as a small kernel.

    result: given the op's arguments, tensors like its results; for tracing.
    """
    name = schema.split("(")[0]
    if name in _libraries:  # an import that was interrupted (Ctrl-C) comes again
        _libraries.pop(name)._destroy()
    torch_library = _libraries[name] = torch.library.Library("twinflow", "FRAGMENT")
    torch_library.define(schema)

    def register(function: Function) -> Function:
        for device in ("CPU", "CUDA"):
            torch_library.impl(name, function, device)
        torch.library.register_fake(f"twinflow::{name}", result, lib=torch_library)
        dispatched: Function = getattr(torch.ops.twinflow, name).default
        PLAIN[dispatched] = function

        @wraps(function)
        def call(first: Any, *others: Any) -> Any:
            x = first if isinstance(first, Tensor) else first[0]
            seen = type(x) is not Tensor or x.is_meta or watched()  # tensors may stand for others: meta and fake ones
            return (dispatched if seen else function)(first, *others)

        return call

    return register


def op_and_quantized(signature: str, result: Function, quantized_result: Function) -> Callable[[Function], Any]:
    """`op` twice: of `signature`, "name(arguments) -> results", and of name_quantized, which has one argument more,
    `dtype`, and gives 8-bit values and scales in place of the last tensor. The function's `dtype` is None for the
    former."""
    name, _, rest = signature.partition("(")
    arguments, _, results = rest.partition(") -> ")
    values = "(Tensor, Tensor)" if results == "Tensor" else "(Tensor, Tensor, Tensor)"
    other = f"{name}_quantized({arguments.replace('=None', '')}, ScalarType dtype) -> {values}"
    return lambda function: (op(signature, result)(function), op(other, quantized_result)(function))


def run(name: str, x: Tensor, *arguments: Any) -> None:
    """Run a kernel where x lives, in x's dtype, on torch's threads or current stream."""
    kernels = kernels_of(x)
    if isinstance(kernels, str):
        raise DeviceError(kernels)
    dtype = DTYPES.get(x.dtype)
    if dtype is None:
        raise TypeError(f"twinflow::{name} stores float32 or bfloat16, not {x.dtype}")
    if x.is_cpu:
        getattr(kernels, name)(*arguments, (dtype, torch.get_num_threads(), 0))
    else:
        with torch.cuda.device(x.device):
            getattr(kernels, name)(*arguments, (dtype, 0, torch.cuda.current_stream().cuda_stream))


def kernels_of(x: Tensor) -> Any:
    """The kernels where x lives, or why there are none."""
    return library.load("cpu" if x.is_cpu else x.device.type)  # a device's name takes as long as a few arguments


# -- arguments ------------------------------------------------------------------------------------------------


def rows_of(x: Tensor) -> tuple[Rows, torch.Size]:
    """x as [B, S, D]: its rows and its shape. Copied only if elements of a row are not adjacent."""
    if x.ndim != 3:
        x = x.reshape(x.shape[0] if x.ndim > 3 else 1, -1, x.shape[-1])
    batch, row, element = x.stride()
    if element != 1 and x.shape[2] != 1:
        x = x.contiguous()
        batch, row, _ = x.stride()
    return (x.data_ptr(), batch, row, x), x.shape


def weights_of(weight: Tensor | None, x: Tensor) -> Weights:
    """A weight for the rows of x: [D] or [B or 1, 1, D], or None. Raises TypeError, ValueError for another."""
    if weight is None:
        return 0, 0
    shape, of_weight = x.shape, weight.shape
    dim = shape[-1]
    if weight.dtype != torch.float32 or weight.device != x.device:
        raise TypeError(f"a norm weight is float32 on {x.device}, not {weight.dtype} on {weight.device}")
    shared = weight.numel() == dim
    if of_weight[-1] != dim or not (shared or (len(shape) == 3 and of_weight == (shape[0], 1, dim))):
        raise ValueError(f"a norm weight for {tuple(shape)} is [D] or [B or 1, 1, D], not {tuple(of_weight)}")
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    return weight.data_ptr(), 0 if shared else weight.stride(0), weight


def check_like(name: str, x: Tensor, other: Tensor) -> None:
    """Raise ValueError unless `other`, called `name`, has the shape, dtype and device of x."""
    if other.shape != x.shape or other.dtype != x.dtype or other.device != x.device:
        raise ValueError(f"{name} must be like x: {other.dtype} {tuple(other.shape)}, {x.dtype} {tuple(x.shape)}")


def address(x: Tensor | None) -> int:
    """Where x's elements begin; 0 for None."""
    return 0 if x is None else x.data_ptr()


# -- results --------------------------------------------------------------------------------------------------


def fresh(x: Tensor) -> Tensor:
    """Contiguous room for a tensor like x; `new_empty` takes twice as long."""
    return roomy(torch.empty_like(x, memory_format=torch.contiguous_format))


def roomy(fresh: Tensor) -> Tensor:
    """A tensor that was just allocated, in huge pages where it is large and the CPU's."""
    if (nbytes := fresh.nbytes) >= HUGE and fresh.is_cpu:
        prefer_huge_pages(fresh.data_ptr(), nbytes)
    return fresh


def results(x: Tensor, dtype: torch.dtype | None, width: int | None = None) -> tuple[Any, Out]:
    """Room for a tensor like x, or one with rows of `width`, and how a kernel is told to write there. Where dtype is
    not None, for 8-bit values and scales: a GPU's kernels make int8 and float8_e4m3fn, a CPU's int8. Raises TypeError
    for another dtype."""
    if dtype is None:
        out = fresh(x) if width is None else x.new_empty((*x.shape[:-1], width))
        return out, (out.data_ptr(), 0, 0)
    values, scales = quantized_like(x, dtype, width=width)
    if dtype != torch.int8 and not isinstance(kernels_of(x), library.CudaKernels):
        raise TypeError(f"native rows of a CPU are int8, not {dtype}")
    return (values, scales), (values.data_ptr(), scales.data_ptr(), FORMATS[dtype])


# -- what torch.compile must know of results ------------------------------------------------------------------


def like(x: Tensor, *_: Any) -> Tensor:
    """A tensor like x, contiguous."""
    return x.new_empty(x.shape)


def quantized_like(x: Tensor, *rest: Any, width: int | None = None) -> Pair:
    """Values like x in the dtype that is the last argument, or rows of `width`; and a float32 scale for each row."""
    dtype = rest[-1]
    if dtype not in FORMATS:
        raise TypeError(f"rows are int8 or float8_e4m3fn, not {dtype}")
    values = x.new_empty((*x.shape[:-1], x.shape[-1] if width is None else width), dtype=dtype)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
