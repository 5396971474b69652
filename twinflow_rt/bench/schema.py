"""The record's schema, version 1, and its validation.

`SCHEMA` is JSON Schema (2020-12); `validate` checks the part of that language it uses: type, const,
required, properties, additionalProperties, items, minimum. docs/benchmarking.md explains the fields.
"""

from __future__ import annotations

from typing import Any

from ..checkpoint.versions import refusal
from ..errors import ConfigError

VERSION = 1

Spec = dict[str, Any]
STRING: Spec = {"type": "string"}
NUMBER: Spec = {"type": "number"}
POSITIVE: Spec = {"type": "number", "minimum": 0}
COUNT: Spec = {"type": "integer", "minimum": 0}
BOOLEAN: Spec = {"type": "boolean"}


def _object(required: dict[str, Spec], optional: dict[str, Spec] | None = None, closed: bool = True) -> Spec:
    properties = {**required, **(optional or {})}
    return {"type": "object", "required": [*required], "properties": properties, "additionalProperties": not closed}


def _map(values: Spec) -> Spec:
    return {"type": "object", "additionalProperties": values}


def _list(items: Spec) -> Spec:
    return {"type": "array", "items": items}


def _or_null(spec: Spec) -> Spec:
    return {**spec, "type": [spec["type"], "null"]}


SAMPLES = _object({
    **dict.fromkeys(("median", "p50", "p90", "p99", "mad", "iqr", "min"), POSITIVE), "samples": _list(POSITIVE),
})  # fmt: skip
PEAKS = _object({
    "device_allocated": _or_null(COUNT), "device_reserved": _or_null(COUNT), "host_resident": COUNT,
    "host_peak_is_of_stage": BOOLEAN,
})  # fmt: skip
ERROR = _object({"worst": _or_null(NUMBER), "rms": _or_null(NUMBER)})
VERDICT = _object({"errors": _map(ERROR), "passed": BOOLEAN, "reason": STRING})
TIMELINE = _object({
    "seconds": _list(POSITIVE), "host_resident": _list(COUNT), "device_allocated": _list(COUNT),
    "marks": _list(_object({"seconds": POSITIVE, "phase": STRING})),
})  # fmt: skip
MACHINE = _object({
    "cpu": STRING, "cores": COUNT, "threads": COUNT, "cpu_clock_mhz": _or_null(NUMBER),
    "load_average": _or_null(NUMBER), "memory_bytes": COUNT, "system": STRING,
    "gpu": _or_null(_object({"name": STRING, "memory_bytes": COUNT}, closed=False)), "python": STRING,
    "cuda": _or_null(STRING), "packages": _map(_or_null(STRING)), "commit": _or_null(STRING),
})  # fmt: skip
SETTINGS = _object({
    "model": STRING, "random_weights": _or_null(STRING), "scale": POSITIVE, "layers": _or_null(COUNT),
    "width": COUNT, "height": COUNT, "batch": COUNT, "nfe": COUNT, "device": STRING, "dtype": STRING,
    "precision": _or_null(STRING), "backend": STRING, "prompts": _list(STRING), "seed": COUNT, "repeats": COUNT,
    "warmup": COUNT, "tolerance": _or_null(POSITIVE),
})  # fmt: skip
MODEL = _object({
    "family": STRING, "parameters": COUNT, "weight_bytes": COUNT, "ops": _map(STRING), "prompt_tokens": _list(COUNT),
})  # fmt: skip
EFFICIENCY = _object({
    "flops": COUNT, "weight_bytes": COUNT, "flops_per_second": POSITIVE, "bytes_per_second": POSITIVE,
    "floor_seconds": POSITIVE, "fraction_of_floor": POSITIVE, "bound": STRING,
})  # fmt: skip
CEILINGS = _object({"gemm": _map(POSITIVE), "copy": POSITIVE, "sizes": _map(COUNT), "drift": POSITIVE})
RUN = _object({}, {"seconds": SAMPLES, "images_per_second": POSITIVE, "memory": PEAKS, "reason": STRING})
BATCH = {**RUN, "required": ["batch"], "properties": {**RUN["properties"], "batch": COUNT}}
THREADS = {**RUN, "required": ["threads"], "properties": {**RUN["properties"], "threads": COUNT}}
EVALUATIONS = {**RUN, "required": ["nfe"], "properties": {**RUN["properties"], "nfe": COUNT}}
PEER = _object({
    "name": STRING, "seconds": _or_null(SAMPLES), "correctness": _or_null(VERDICT), "speedup": _or_null(POSITIVE),
    "interval": _or_null(_list(POSITIVE)), "reason": STRING,
})  # fmt: skip
SCHEMA: Spec = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "twinflow_rt benchmark record",
    **_object({
        "schema": {"const": VERSION}, "created": STRING, "command": STRING, "machine": MACHINE, "settings": SETTINGS,
        "model": MODEL, "ceilings": CEILINGS, "correctness": VERDICT, "stages": _map(SAMPLES),
        "efficiency": _map(EFFICIENCY), "memory": _object({"loaded": PEAKS, "stages": _map(PEAKS)}),
        "cold_start": _or_null(_object({"runs": COUNT, "phases": _map(SAMPLES), "timeline": TIMELINE})),
        "batches": _list(BATCH), "concurrency": _list(THREADS), "evaluations": _list(EVALUATIONS),
        "energy": _object({}, {"joules_per_image": POSITIVE, "watts": POSITIVE, "images": COUNT, "reason": STRING}),
        "instructions": _object({}, {"per_image": POSITIVE, "tool": STRING, "images": COUNT, "reason": STRING}),
        "peers": _list(PEER), "notes": _list(STRING),
    }),
}  # fmt: skip

TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,), "object": (dict,),
    "array": (list,), "null": (type(None),),
}  # fmt: skip


def validate(value: Any, spec: Spec = SCHEMA, where: str = "record") -> None:
    """Raises ConfigError naming the first place where `value` departs from `spec`."""
    if "const" in spec:
        if value != spec["const"]:
            raise ConfigError(refusal(where.removesuffix(".schema"), value, spec["const"], "measure again"))
        return
    kinds = spec["type"] if isinstance(spec["type"], list) else [spec["type"]]
    if not any(_is(value, kind) for kind in kinds):
        kind = type(value).__name__
        raise ConfigError(f"{where} must be {' or '.join(kinds)}, not {kind}: not a bench record, or damaged")
    if "minimum" in spec and value is not None and not value >= spec["minimum"]:
        raise ConfigError(f"{where} is {value}, below {spec['minimum']}: the record is damaged")
    if isinstance(value, dict):
        _validate_object(value, spec, where)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            validate(item, spec["items"], f"{where}[{i}]")


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _validate_object(value: dict[str, Any], spec: Spec, where: str) -> None:
    properties, others = spec.get("properties", {}), spec.get("additionalProperties", True)
    for key, fixed in properties.items():  # the version first: what else differs follows from it
        if "const" in fixed and key in value:
            validate(value[key], fixed, f"{where}.{key}")
    if missing := [key for key in spec.get("required", ()) if key not in value]:
        raise ConfigError(f"{where} lacks {', '.join(missing)}: not a bench record, or damaged")
    for key, item in value.items():
        if key in properties:
            validate(item, properties[key], f"{where}.{key}")
        elif others is False:
            raise ConfigError(f"{where} has an unknown field {key!r}: written by another version")
        elif isinstance(others, dict):
            validate(item, others, f"{where}.{key}")
