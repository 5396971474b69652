"""How time changes with batch size and with evaluations per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import ConfigError, DeviceError
from ..pipeline import Pipeline
from .memory import stage_peaks
from .timing import interleave, measure
from .workload import Workload, batch_of

Row = dict[str, Any]


def batches(pipe: Pipeline, work: Workload, sizes: Iterable[int], repeats: int, max_seconds: float) -> list[Row]:
    """Measure seconds per call, images per second and peak memory of each batch size; sizes take turns.

    A size that does not fit in memory gets a reason instead.
    """
    rows: dict[int, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for size in sizes:
        larger = replace(work, prompts=batch_of(work.prompts[0], size))
        try:
            rows[size] = {"batch": size, "memory": stage_peaks(partial(larger.call, pipe), pipe.device)}
        except DeviceError as error:
            rows[size] = {"batch": size, "reason": str(error)}
            continue
        calls[str(size)] = partial(larger.call, pipe)
    taken = interleave(calls, device=pipe.device, repeats=repeats, warmup=1, max_seconds=max_seconds)
    for name, samples in taken.items():
        size = int(name)
        rows[size] |= {"seconds": samples.to_dict(), "images_per_second": size / samples.median}
    return list(rows.values())


def evaluations(pipe: Pipeline, work: Workload, counts: Iterable[int], repeats: int, max_seconds: float) -> list[Row]:
    """Measure seconds per call at each number of evaluations, one after the other, as each folds the program anew
    (in the warm-up). The workload's own comes first: what was absorbed into weights for one evaluation
    is not after another schedule. A saved artifact holds one schedule: the others get a reason."""
    rows: list[Row] = []
    for count in sorted(counts, key=lambda n: (n != work.nfe, n)):
        several = replace(work, nfe=count)
        try:
            several.call(pipe)
        except ConfigError as error:
            rows.append({"nfe": count, "reason": str(error)})
            continue
        call = partial(several.call, pipe)
        samples = measure(call, device=pipe.device, repeats=repeats, warmup=1, max_seconds=max_seconds)
        row = {"nfe": count, "seconds": samples.to_dict(), "images_per_second": len(work.prompts) / samples.median}
        rows.append(row)
    return sorted(rows, key=lambda row: row["nfe"])
