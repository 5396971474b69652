"""Time and memory of each stage, measured without making the device wait."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CancelledError
from ..host_memory import peak_bytes

TRIM_EVERY = 2_000_000  # bytes read


class Stages:
    """Measures named stages; asks `cancel` before each.

    Seconds: on CUDA between events on the current stream (so without synchronising), elsewhere wall
    time. Bytes: on CUDA the stage's peak of allocated device memory; on the CPU the process's peak
    resident memory so far, which only ever rises: the stage where it jumps is the one that needed it.
    """

    def __init__(self, device: torch.device, cancel: Callable[[], bool] | None = None) -> None:
        self.device, self.cancel = device, cancel
        self.memory: dict[str, int] = {}
        self._marks: dict[str, tuple[Any, Any]] = {}  # times, or events of the device
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.check(f"before its {name} stage")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        begin = self._mark()
        yield
        self._marks[name] = (begin, self._mark())
        self.memory[name] = self._peak()

    def check(self, where: str) -> None:
        """Raises CancelledError, which says where, if the caller has asked to stop."""
        if self.cancel is not None and self.cancel():
            raise CancelledError(f"generation was cancelled {where}")

    def timings(self) -> dict[str, float]:
        """Seconds per stage, and `total` in wall time. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            seconds = {name: a.elapsed_time(b) / 1e3 for name, (a, b) in self._marks.items()}
        else:
            seconds = {name: b - a for name, (a, b) in self._marks.items()}
        return {**seconds, "total": time.perf_counter() - self._start}

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_bytes()


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, now; outside Linux its peak resident memory."""
    if not sys.platform.startswith("linux"):
        return peak_bytes()
    with open("/proc/self/statm", encoding="ascii") as file:
        resident, shared = map(int, file.read().split()[1:3])
    return (resident - shared) * resource.getpagesize()


@dataclass(frozen=True)
class LoadReport:
    """What loading one network took.

    seconds: wall time. tensors: of the network. bytes_read, bytes_unused: of the files.
    peak_host_bytes: how far the process's anonymous memory rose above its level at the start; mapped
    file pages, which the system can drop at any time, are not in it.
    """

    seconds: float
    tensors: int
    bytes_read: int
    bytes_unused: int
    peak_host_bytes: int

    def __str__(self) -> str:
        mega = f"{self.bytes_read / 1e6:,.1f} MB read, {self.bytes_unused / 1e6:,.1f} MB of the files not needed"
        return f"loaded in {self.seconds:.2f} s: {mega}; host memory rose by {self.peak_host_bytes / 1e6:,.1f} MB"


class Meter:
    """Bytes read, and the highest anonymous memory seen when a tensor had just been read.

    Keeps that low, too: while tensors of some megabytes come and go between others that stay, the C
    library would hold on to every gap, so it is asked to give them back now and then.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Measures from here on."""
        self.began, self.bytes_read, self._trimmed = time.perf_counter(), 0, 0
        self.base = self.peak = anonymous_bytes()

    def add(self, size: int) -> None:
        self.bytes_read += size
        self.peak = max(self.peak, anonymous_bytes())
        if self.bytes_read - self._trimmed > TRIM_EVERY:
            self._trimmed = self.bytes_read
            release_free_memory()

    def report(self, tensors: int, stored: int) -> LoadReport:
        """tensors: how many the network has; stored: bytes in the files."""
        self.add(0)
        release_free_memory()
        seconds, unused = time.perf_counter() - self.began, stored - self.bytes_read
        return LoadReport(seconds, tensors, self.bytes_read, unused, self.peak - self.base)


def release_free_memory() -> None:
    """Returns freed memory to the system, where the C library has a call for that (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
