"""Resident memory of this process over time. Imports no torch, so that importing torch can be watched."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from ..host_memory import resident_bytes


def _device_bytes() -> int:
    torch = sys.modules.get("torch")
    cuda: Any = getattr(torch, "cuda", None)  # None while torch is being imported
    return cuda.memory_allocated() if hasattr(cuda, "is_initialized") and cuda.is_initialized() else 0


class Timeline:
    """Samples (seconds, resident bytes, device bytes) of this process from a thread, with named marks.

    `origin` is the time.monotonic() that counts as 0.
    """

    def __init__(self, origin: float, interval: float = 0.01) -> None:
        self.origin, self.interval = origin, interval
        self.samples: list[tuple[float, int, int]] = []
        self.marks: list[tuple[float, str]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Timeline:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def mark(self, name: str) -> float:
        """End the phase `name` here; return the seconds since the origin."""
        now = time.monotonic() - self.origin
        self.marks.append((now, name))
        self._sample()
        return now

    def _work(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        self.samples.append((time.monotonic() - self.origin, resident_bytes(), _device_bytes()))

    def to_dict(self, most: int = 400) -> dict[str, Any]:
        """Return at most `most` samples, evenly chosen, the last one and the highest always among them."""
        chosen = set(range(0, len(self.samples), max(1, -(-len(self.samples) // most))))
        chosen |= {len(self.samples) - 1} | {
            max(range(len(self.samples)), key=lambda i: self.samples[i][column]) for column in (1, 2)
        }
        rows = [self.samples[i] for i in sorted(chosen)]
        return {
            "seconds": [round(t, 4) for t, _, _ in rows],
            "host_resident": [host for _, host, _ in rows],
            "device_allocated": [device for _, _, device in rows],
            "marks": [{"seconds": round(t, 4), "phase": name} for t, name in self.marks],
        }
