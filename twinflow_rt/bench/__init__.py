"""Measuring: latency, memory, throughput and their ceilings, with a correctness check in the same run.

    from twinflow_rt import bench
    record = bench.run("demo", peers=("eager",))
    bench.save(record, "record.json")
    print(bench.compare(bench.load("before.json"), record))
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "run": "runner", "Settings": "settings", "save": "record", "load": "record", "compare": "comparison",
    "render": "html",
}  # fmt: skip
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'twinflow_rt.bench' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
