"""Memory in tests: the peak of a process while something runs, and the least budget of a model."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from twinflow_rt.errors import ConfigError
from twinflow_rt.host_memory import anonymous_bytes
from twinflow_rt.loading import load
from twinflow_rt.planning import memory_plan


class Peak:
    """with Peak() as peak: ...; then `peak.bytes`: the most of this process's anonymous memory meanwhile above what
    it was at the start, looked at every so many seconds."""

    def __init__(self, every: float = 0.0005) -> None:
        self.every = every

    def __enter__(self) -> Peak:
        self.base = self.most = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, anonymous_bytes())
            time.sleep(self.every)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self.most - self.base


def run_script(script: str, *args: Any) -> str:
    """What a script prints that runs in a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, args)]
    root = Path(__file__).parents[1]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def least(folder: str | Path, **options: Any) -> int:
    """The smallest budget the model runs in: that of the smallest plan made where none fits."""
    plans, keep = [], memory_plan._planned
    memory_plan._planned = lambda *args: plans.append(keep(*args)) or plans[-1]
    try:
        with pytest.raises(ConfigError, match="is too small for this model: with everything streamed"):
            load(folder, memory_budget=1, **options)
    finally:
        memory_plan._planned = keep
    return min(plan.peak for plan in plans)
