"""What the launchers share: shapes as rows, checks, the compute capability."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ConfigError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HOST_ARCH = 80  # what the heuristics assume of tensors that are on no GPU (Triton's interpreter)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least max(n, 1)."""
    return 1 << max(n - 1, 0).bit_length()


@lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch(x: Tensor) -> int:
    """Compute capability of x's device, 90 for 9.0."""
    return _capability(x.device.index) if x.is_cuda else HOST_ARCH


def require_floats(where: str, *tensors: Tensor) -> None:
    """Raises ConfigError for a tensor that is in none of the storage types the kernels read."""
    for x in tensors:
        if x.dtype not in FLOATS:
            raise ConfigError(f"{where}: needs bfloat16, float16 or float32, got {x.dtype}")


def rows(x: Tensor) -> Tensor:
    """x as [B, S, D] with a contiguous last dimension: a view wherever one exists."""
    x = x if x.dim() == 3 else x.reshape(x.shape[0] if x.dim() > 3 else 1, -1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
