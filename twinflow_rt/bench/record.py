"""Records: what one run of the bench measured, as JSON of a versioned schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import write_json
from ..checkpoint.files import parse_json
from ..errors import ConfigError
from .schema import validate

Record = dict[str, Any]  # as `schema.RecordFields` describes


def save(record: Record, path: str | Path) -> Path:
    """Write a record, whole or not at all. Raises ConfigError where it is not one."""
    validate(record)
    return write_json(path, record)


def load(path: str | Path) -> Record:
    """Read and validate a record. Raises ConfigError naming what is wrong with it."""
    try:
        record: Record = parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; `twinflow-rt bench MODEL --json FILE` writes a record") from None
    except OSError as error:
        raise ConfigError(f"{str(path)!s:.300} cannot be read ({error.strerror}); give a record's file") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); give a record's file") from None
    try:
        validate(record)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return record


def timings(record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (figure, samples) of everything timed, under names that two records share."""
    for name, samples in record["stages"].items():
        yield f"stage {name}", samples
    for name, samples in (record["cold_start"] or {"phases": {}})["phases"].items():
        yield f"cold {name}", samples
    for key, label in (("batches", "batch"), ("concurrency", "threads"), ("evaluations", "nfe")):
        for entry in record.get(key, []):
            if "seconds" in entry:
                yield f"{label} {entry[label]}", entry["seconds"]
    for peer in record["peers"]:
        if peer["seconds"]:
            yield f"peer {peer['name']}", peer["seconds"]
