"""What the launchers share: shapes as rows, checks, the compute capability."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZED = (torch.float8_e4m3fn, torch.int8)
HOST_ARCH = 89  # what is assumed of tensors that are on no GPU (Triton's interpreter): every storage type
MAX_WIDTH = 16384  # a wider row no longer fits the registers of one block


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least max(n, 1)."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """`block` elements per program, on `warps` warps."""

    block: int
    warps: int


@dataclass(frozen=True)
class RowTile:
    """Tile of a program that holds whole rows: `rows` x `block` elements on `warps` warps."""

    rows: int
    block: int
    warps: int


def row_tile(where: str, count: int, width: int, dtype: torch.dtype, mixed: bool = False) -> RowTile:
    """Tile for `count` rows of `width` elements; ValueError where a row is too wide.

    A thread holds 16 elements (8 of float32, so that its loads stay 16 bytes wide but few), more
    once 16 warps are in use. Narrow rows share a program, as many as there are. `mixed`: the kernel
    writes `dtype` and bytes, and with 8 elements a thread both stores take them where they are.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"{where}: rows of at most {MAX_WIDTH} elements, got {width}")
    block = power_of_two(width)
    rows = min(max(2048 // block, 1), power_of_two(count))
    per_warp = 32 * (8 if mixed or dtype.itemsize == 4 else 16)
    return RowTile(rows, block, min(max(rows * block // per_warp, 1), 16))


@lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch(x: Tensor) -> int:
    """Compute capability of x's device, 90 for 9.0."""
    return _capability(x.device.index) if x.is_cuda else HOST_ARCH


def require_floats(where: str, *tensors: Tensor) -> None:
    """Raises ValueError for a tensor that is in none of the storage types the kernels read."""
    for x in tensors:
        if x.dtype not in FLOATS:
            raise ValueError(f"{where}: needs bfloat16, float16 or float32, got {x.dtype}")


def require_quantized(where: str, dtype: torch.dtype, arch: int) -> None:
    """Raises ValueError for a dtype that rows cannot be quantized to on compute capability `arch`."""
    if dtype not in QUANTIZED:
        raise ValueError(f"{where}: rows quantize to float8_e4m3fn or int8, got {dtype}")
    if dtype == torch.float8_e4m3fn and arch < 89:
        raise ValueError(f"{where}: float8_e4m3fn needs compute capability 8.9, this is {arch / 10}; use int8")


def rows(x: Tensor) -> Tensor:
    """x as [B, S, D] with a contiguous last dimension: a view wherever one exists."""
    x = x if x.dim() == 3 else x.reshape(x.shape[0] if x.dim() > 3 else 1, -1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def with_scratch(device: torch.device, kernel: Callable, *args, **options) -> None:
    """Launches a kernel that makes tensor descriptors, for which Triton needs memory on `device`.

    Triton's allocator is a context variable: it is set in a copy of the context, and nowhere else.
    """

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        kernel(*args, **options)

    copy_context().run(run)
