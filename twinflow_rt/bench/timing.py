"""Times of callables that can be compared: interleaved, warmed up, synchronised, with all samples kept.

Callables compared with one another run in rounds, each once per round and in a new order, so that a machine that slows
down or heats up slows all of them. On a GPU a sample ends when the device has finished: a launch never passes for time.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from ..runtime.timer import Timer


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
        """Return the value at `q` in [0, 1], interpolated linearly between samples."""
        return float(np.quantile(self.seconds, q))

    def to_dict(self) -> dict[str, Any]:
        """Return summary and samples, in seconds, as JSON can hold them."""
        return {
            "median": self.median, "p50": self.quantile(0.5), "p90": self.quantile(0.9), "p99": self.quantile(0.99),
            "mad": self.mad, "iqr": self.iqr, "min": min(self.seconds), "samples": list(self.seconds),
        }  # fmt: skip


def interleave(
    calls: Mapping[str, Callable[[], Any]], *, device: torch.device | str = "cpu", repeats: int = 20, warmup: int = 3,
    max_seconds: float = math.inf, clock: str = "wall", flush_l2: bool = False, seed: int = 0,
) -> dict[str, Samples]:  # fmt: skip
    """Time each callable, and return its Samples by name: `warmup` unmeasured rounds, then up to `repeats` measured
    ones.

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
    """Time one callable; options as of `interleave`."""
    return interleave({"": call}, **options)[""]
