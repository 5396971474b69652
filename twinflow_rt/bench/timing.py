"""Times of callables that can be compared: interleaved, warmed up, synchronised, with all samples kept.

Callables compared with one another run in rounds, each once per round and in a new order, so that a
machine that slows down or heats up slows all of them. On a GPU a sample ends when the device has
finished: a launch never passes for time.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError

CLOCKS = ("wall", "device")
DEFAULT_L2_BYTES = 64 << 20  # where torch does not tell


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics (numpy's default), q in [0, 1]."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


@dataclass(frozen=True)
class Samples:
    """Seconds per call, in the order taken; at least one."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ConfigError("a measurement needs at least one sample; repeats must be 1 or more")

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def mad(self) -> float:
        """Median absolute deviation from the median: the spread that one slow sample does not move."""
        return statistics.median(abs(s - self.median) for s in self.seconds)

    @property
    def iqr(self) -> float:
        return self.quantile(0.75) - self.quantile(0.25)

    def quantile(self, q: float) -> float:
        return quantile(self.seconds, q)

    def to_dict(self) -> dict[str, Any]:
        """Summary and samples, seconds."""
        return {
            "median": self.median, "p50": self.quantile(0.5), "p90": self.quantile(0.9), "p99": self.quantile(0.99),
            "mad": self.mad, "iqr": self.iqr, "min": min(self.seconds), "samples": list(self.seconds),
        }  # fmt: skip


def synchronize(device: torch.device | str) -> None:
    """Waits until the device has done all it was given; on a CPU nothing is left to wait for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class L2Flush:
    """Writes more than the L2 cache holds, so that the next call finds none of its inputs there.

    On a CPU it does nothing: models there are larger than the caches, and microbenchmarks vary more
    by the flush than by what it removes.
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
    """Seconds of one call on `device`.

    clock "wall": host time from the call until the device is idle, launches included: what a user
    waits. clock "device": between CUDA events around the call's work, for single kernels; queued
    behind the L2 flush, launches overlap with it. A CPU has the wall clock only and uses it for both.
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


def interleave(
    calls: Mapping[str, Callable[[], Any]], *, device: torch.device | str = "cpu", repeats: int = 20, warmup: int = 3,
    max_seconds: float = math.inf, clock: str = "wall", flush_l2: bool = False, seed: int = 0,
) -> dict[str, Samples]:  # fmt: skip
    """name -> Samples of each callable: `warmup` unmeasured rounds, then up to `repeats` measured ones.

    max_seconds: no new round begins after so long (three are run in any case, or `repeats` if fewer).
    Raises ConfigError for repeats < 1 or warmup < 0; whatever a callable raises is passed on.
    """
    if repeats < 1 or warmup < 0:
        raise ConfigError(f"repeats must be 1 or more and warmup 0 or more; got {repeats} and {warmup}")
    timer, order, shuffle = Timer(device, clock, flush_l2), list(calls), random.Random(seed).shuffle
    taken: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(warmup):
        for name in order:
            timer(calls[name])
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - start > max_seconds:
            break
        shuffle(order)
        for name in order:
            taken[name].append(timer(calls[name]))
    return {name: Samples(tuple(seconds)) for name, seconds in taken.items()}


def measure(call: Callable[[], Any], **options: Any) -> Samples:
    """`interleave` of one callable."""
    return interleave({"": call}, **options)[""]
