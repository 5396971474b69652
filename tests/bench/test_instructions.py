"""Instruction counts: the tools' outputs, their absence, and one real count."""

from __future__ import annotations

import shutil

import pytest

from twinflow_rt.bench import instructions
from twinflow_rt.bench.probe import Task


def test_perf_output():
    assert instructions.parse_perf("123456789,,instructions:u,5000,100.00,,\n") == 123456789
    assert instructions.parse_perf("# started\n\n42.5,msec,task-clock:u,1,100.00,,\n") == 42.5
    assert instructions.parse_perf("<not supported>,,instructions:u,0,100.00,,\n") is None
    assert instructions.parse_perf("") is None


def test_callgrind_output():
    assert instructions.parse_callgrind("events: Ir\nfn=(1)\ntotals: 12\n\nevents: Ir\ntotals: 30\n") == 42
    assert instructions.parse_callgrind("summary: 0\n") == 0


def test_no_tool_is_a_reason(tiny, monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    task = Task("instructions", str(tiny), "cpu", None, None, 1, "x", 0, 16, 16, 1)
    assert instructions.count(task) == {
        "reason": "perf: perf is not installed; callgrind: valgrind and callgrind_control not installed"
    }


@pytest.mark.full
def test_counts_are_stable(tiny):
    """Two counts of the same image agree to a part in a hundred."""
    if all(instructions.available(tool) for tool in instructions.TOOLS):
        pytest.skip("neither perf nor callgrind can count here")
    task = Task("instructions", str(tiny), "cpu", None, None, 1, "a red circle", 0, 16, 16, 1)
    first, second = instructions.count(task), instructions.count(task)
    assert first["per_image"] > 1e6 and first["per_image"] == pytest.approx(second["per_image"], rel=0.01)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_perf_counts_images_only(tiny):
    """The switch works: a software event, which every machine has, counts milliseconds, not the start's seconds."""
    task = Task("instructions", str(tiny), "cpu", None, None, 1, "a red circle", 0, 64, 64, 1, images=1)
    few = instructions._perf(task, "task-clock:u")
    assert 0 < few < 1000
