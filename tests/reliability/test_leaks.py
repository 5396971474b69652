"""Nothing grows with the number of generations: a hundred here, two thousand by `make leaks`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import leaks


def watched(runs: int) -> dict:
    """In a process of its own: other tests' garbage would hide ours, and be blamed on us."""
    command = [sys.executable, "-m", "tests.reliability.leaks", "--runs", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["over"] else 0)
    return report


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("runs", [100, pytest.param(leaks.RUNS, marks=pytest.mark.full)])
def test_nothing_grows(runs):
    report = watched(runs)
    assert not report["over"], report
    assert 0 < report["finished"] < runs == report["runs"]
    assert report["after"]["prompts"] > 0


def test_a_leak_is_seen(monkeypatch):
    """A pipeline that keeps its results is over the bounds."""
    kept = []
    generate = leaks.generate

    def leaking(pipe, kind, seed):
        kept.append((bytearray(4 << 20), open(__file__)))  # noqa: SIM115
        return generate(pipe, {**kind, "height": 32, "width": 32, "nfe": 1, "num_images": 1}, seed)

    monkeypatch.setattr(leaks, "generate", leaking)
    monkeypatch.setattr(leaks, "KINDS", 2)
    try:
        over = leaks.watch(12)["over"]
    finally:
        for _, file in kept:
            file.close()
    assert {line.split(":")[0] for line in over} >= {"resident", "files"}
