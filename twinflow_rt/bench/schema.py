"""The record's schema, version 1: what a file must hold to be one. docs/benchmarking.md explains the fields."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

from ..checkpoint.typed_json import typed
from ..checkpoint.versions import refusal
from ..errors import ConfigError

VERSION = 1

Positive = Annotated[float, 0]
Count = Annotated[int, 0]

Samples = TypedDict("Samples", {
    "median": Positive, "p50": Positive, "p90": Positive, "p99": Positive, "mad": Positive, "iqr": Positive,
    "min": Positive, "samples": list[Positive],
})  # fmt: skip
Peaks = TypedDict("Peaks", {
    "device_allocated": Count | None, "device_reserved": Count | None, "host_resident": Count,
    "host_peak_is_of_stage": bool,
})  # fmt: skip
Error = TypedDict("Error", {"worst": float | None, "rms": float | None})
Verdict = TypedDict("Verdict", {"errors": dict[str, Error], "passed": bool, "reason": str})
Mark = TypedDict("Mark", {"seconds": Positive, "phase": str})
Timeline = TypedDict("Timeline", {
    "seconds": list[Positive], "host_resident": list[Count], "device_allocated": list[Count], "marks": list[Mark],
})  # fmt: skip
ColdStart = TypedDict("ColdStart", {"runs": Count, "phases": dict[str, Samples], "timeline": NotRequired[Timeline]})
Memory = TypedDict("Memory", {"loaded": Peaks, "stages": dict[str, Peaks]})
Gpu = TypedDict("Gpu", {
    "name": str, "capability": str, "multiprocessors": Count, "memory_bytes": Count, "l2_bytes": Count | None,
    "driver": str | None, "power_limit_w": float | None, "max_sm_clock_mhz": float | None,
    "sm_clock_mhz": float | None, "memory_clock_mhz": float | None, "temperature_c": float | None,
})  # fmt: skip
Machine = TypedDict("Machine", {
    "cpu": str, "cores": Count, "threads": Count, "cpu_clock_mhz": float | None, "load_average": float | None,
    "memory_bytes": Count, "system": str, "gpu": Gpu | None, "python": str, "cuda": str | None,
    "packages": dict[str, str | None], "commit": str | None,
})  # fmt: skip
Settings = TypedDict("Settings", {
    "model": str, "random_weights": str | None, "scale": Positive, "layers": Count | None, "width": Count,
    "height": Count, "batch": Count, "nfe": Count, "device": str, "dtype": str, "precision": str | None,
    "backend": str, "prompts": list[str], "seed": Count, "repeats": Count, "warmup": Count,
    "tolerance": Positive | None,
})  # fmt: skip
Model = TypedDict("Model", {
    "family": str, "parameters": Count, "weight_bytes": Count, "ops": dict[str, str], "prompt_tokens": list[Count],
})  # fmt: skip
Efficiency = TypedDict("Efficiency", {
    "flops": Count, "weight_bytes": Count, "flops_per_second": Positive, "bytes_per_second": Positive,
    "floor_seconds": Positive, "fraction_of_floor": Positive, "bound": str,
})  # fmt: skip
Ceilings = TypedDict("Ceilings", {
    "gemm": dict[str, Positive], "copy": Positive, "sizes": dict[str, Count], "drift": Positive,
})  # fmt: skip
Peer = TypedDict("Peer", {
    "name": str, "seconds": Samples | None, "correctness": Verdict | None, "speedup": Positive | None,
    "interval": list[Positive] | None, "reason": str,
})  # fmt: skip


class Row(TypedDict, total=False):
    """A line of a sweep: measured, or with the reason why not."""

    seconds: Samples
    images_per_second: Positive
    memory: Peaks
    reason: str


class Batch(Row):
    batch: Count


class Callers(Row):
    threads: Count


class Evaluations(Row):
    nfe: Count


# what is NotRequired stands in records of before: it is read and no longer written
RecordFields = TypedDict("RecordFields", {
    "schema": int, "created": str, "command": str, "machine": Machine, "settings": Settings, "model": Model,
    "ceilings": Ceilings, "correctness": Verdict, "stages": dict[str, Samples], "efficiency": dict[str, Efficiency],
    "memory": Memory, "cold_start": ColdStart | None, "batches": list[Batch], "concurrency": NotRequired[list[Callers]],
    "evaluations": list[Evaluations], "energy": NotRequired[dict[str, float | str]],
    "instructions": NotRequired[dict[str, float | str]], "peers": list[Peer], "notes": list[str],
})  # fmt: skip


def validate(record: Any) -> None:
    """Raise ConfigError naming the first place where `record` departs from `RecordFields`, its version first."""
    if isinstance(record, dict) and "schema" in record and record["schema"] != VERSION:
        raise ConfigError(refusal("record", record["schema"], VERSION, "measure again"))
    try:
        typed(record, RecordFields, "record")
    except ValueError as error:
        raise ConfigError(f"{error}: not a bench record, or damaged") from None
