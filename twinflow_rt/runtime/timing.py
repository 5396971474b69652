"""Time and memory of each stage, measured without making the device wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import CancelledError
from ..host_memory import peak_bytes


class StageTimer:
    """Measure named stages of one call; ask `cancel` before each.

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
        """Raise CancelledError, which says where, if the caller has asked to stop."""
        if self.cancel is not None and self.cancel():
            raise CancelledError(f"generation was cancelled {where}")

    def timings(self) -> dict[str, float]:
        """Return seconds per stage, and `total` in wall time. Waits for the device."""
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
