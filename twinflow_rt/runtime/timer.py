"""Seconds of one call, the device's work included: what the benchmarks and `planning.sensitivity` compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError

CLOCKS = ("wall", "device")
DEFAULT_L2_BYTES = 64 << 20  # where torch does not tell


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done all it was given; return at once for a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class L2Flush:
    """Write more than the L2 cache of a GPU holds, so that the next call finds none of its inputs there.

    Does nothing on a CPU: the models are larger than its caches, and small benchmarks vary more with a flush
    than without.
    """

    def __init__(self, device: torch.device | str) -> None:
        device, self.buffer = torch.device(device), None
        if device.type == "cuda":
            size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or DEFAULT_L2_BYTES
            self.buffer = torch.empty(2 * size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


class Timer:
    """Measure the seconds of one call on `device`.

    clock: "wall" is host time from the call until the device is idle, launches included, which is what a user waits.
    "device" is the time between CUDA events around the call's work, for single kernels: launches overlap with the L2
    flush before them. A CPU has the wall clock only and uses it for both. Raises ConfigError for another clock.
    """

    def __init__(self, device: torch.device | str, clock: str = "wall", flush_l2: bool = False) -> None:
        if clock not in CLOCKS:
            raise ConfigError(f"clock must be one of {', '.join(CLOCKS)}; got {clock!r}")
        self.device = torch.device(device)
        self.events = clock == "device" and self.device.type == "cuda"
        self.flush: Callable[[], None] = L2Flush(self.device) if flush_l2 else lambda: None

    def __call__(self, call: Callable[[], Any]) -> float:
        self.flush()
        if self.events:
            return self._between_events(call)
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - start

    def _between_events(self, call: Callable[[], Any]) -> float:
        stream = torch.cuda.current_stream(self.device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
