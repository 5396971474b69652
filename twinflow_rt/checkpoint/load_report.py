"""What reading a network took: seconds, bytes, and how far host memory rose meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..host_memory import anonymous_bytes, release_free_memory

TRIM_EVERY = 2_000_000  # bytes read or made, after which freed memory is returned to the system


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
