"""What this machine can do at best, measured in the run that is judged by it.

    gemm   2 n^3 FLOPs of an n x n x n matrix product over its time, per dtype
    copy   bytes read and written by a large device-to-device copy over its time

The fastest of several repeats counts: a ceiling is what is possible, not what is usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..config import has_native
from ..errors import ConfigError
from .timing import measure as take

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}  # beyond every cache
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e4m3fn,
}  # fmt: skip


@dataclass(frozen=True)
class Ceilings:
    """What was measured. gemm: dtype -> FLOP/s. copy: bytes/s, read and write counted. sizes: n of each product,
    bytes of the copy."""

    gemm: dict[str, float]
    copy: float
    sizes: dict[str, int]

    def seconds(self, flops: float, nbytes: float, dtype: str) -> float:
        """Return the roofline's time: no stage of so many FLOPs and bytes takes less."""
        return max(flops / self.gemm[dtype], nbytes / self.copy)

    def best(self, other: Ceilings) -> Ceilings:
        """Return the higher of two measurements of one machine."""
        gemm = {name: max(rate, other.gemm[name]) for name, rate in self.gemm.items()}
        return Ceilings(gemm, max(self.copy, other.copy), self.sizes)

    def to_dict(self) -> dict[str, Any]:
        return {"gemm": self.gemm, "copy": self.copy, "sizes": self.sizes}


def gemm_size(device_type: str, native: bool) -> int:
    """Return the edge of the measured matrix product: large enough to reach the peak, small enough to take
    well below a second even where the dtype is emulated."""
    if device_type == "cuda":
        return 8192
    return 1536 if native else 256


def measure(device: torch.device | str, dtypes: Iterable[str], *, repeats: int = 7) -> Ceilings:
    """Measure the ceilings of `device` for dtypes out of `DTYPES`.

    float8 is rowwise-scaled e4m3 with bfloat16 results and needs CUDA capability 8.9.
    Raises ConfigError for another dtype.
    """
    device, gemm, sizes = torch.device(device), {}, {}
    for name in dict.fromkeys(dtypes):
        if name not in DTYPES:
            raise ConfigError(f"no matrix product ceiling for dtype {name!r}; use one of {', '.join(DTYPES)}")
        n = gemm_size(device.type, name == "float8" or has_native(DTYPES[name], device))
        call = _float8_gemm(n, device) if name == "float8" else _gemm(n, DTYPES[name], device)
        gemm[name] = 2 * n**3 / min(take(call, device=device, repeats=repeats, warmup=2, clock="device").seconds)
        sizes[name] = n
    size = COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = take(lambda: target.copy_(source), device=device, repeats=repeats, warmup=2, clock="device")
    return Ceilings(gemm, 2 * size / min(copies.seconds), {**sizes, "copy": size})


def _gemm(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def _float8_gemm(n: int, device: torch.device) -> Callable[[], torch.Tensor]:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"{device} has no float8 matrix product; it needs CUDA capability 8.9 or newer")
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    ones = torch.ones(n, 1, device=device)
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
