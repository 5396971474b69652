"""OpenMP's threads stay off the caller's CPU during a call, and end with the affinity that they had."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import pytest
import torch

from twinflow_rt.ops.native import library, norm

CPU = torch.device("cpu")
KERNELS = library.load("cpu")
pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2 or isinstance(KERNELS, str),
    reason="needs Linux, two CPUs and the native kernels",
)


def work(threads: int) -> None:
    torch.set_num_threads(threads)
    norm.rms_norm(torch.ones(64, 40, 64), torch.ones(64), 1e-5)


@pytest.fixture(autouse=True)
def two_threads():
    count = torch.get_num_threads()
    work(2)
    yield
    assert KERNELS.threads_together() == 0
    KERNELS.release_threads()
    torch.set_num_threads(count)


def masks() -> dict[int, set[int]]:
    found = {}
    for task in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError):  # one of a team that was ended
            found[task] = os.sched_getaffinity(task)
    return found


def changed(before: dict[int, set[int]]) -> list[int]:
    """The threads whose affinity is another than it was, each of which lacks one CPU."""
    found = [task for task, mask in masks().items() if before.get(task, mask) != mask]
    assert all(len(before[task] - os.sched_getaffinity(task)) == 1 for task in found)
    assert all(os.sched_getaffinity(task) < before[task] for task in found)
    return found


def test_threads_are_apart_during_a_call_only():
    before, me = masks(), os.getpid()
    for _ in range(3):
        with library.threads_apart(CPU):
            assert len(others := changed(before)) == 1 and me not in others
            work(2)
        assert not changed(before)
    with pytest.raises(ZeroDivisionError), library.threads_apart(CPU):
        assert changed(before)
        _ = 1 // 0
    assert not changed(before)


def test_a_call_within_a_call_leaves_them_to_the_outer_one():
    before = masks()
    with library.threads_apart(CPU):
        with library.threads_apart(CPU):
            assert changed(before)
        assert changed(before)
    assert not changed(before)


def test_where_there_is_nothing_to_part(monkeypatch):
    before, allowed = masks(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert KERNELS.threads_apart(2) == 0
    finally:
        os.sched_setaffinity(0, allowed)
    assert not changed(before)
    monkeypatch.setattr(library, "load", lambda device: pytest.fail("looked for kernels"))
    with library.threads_apart(torch.device("cuda")):
        pass
    torch.set_num_threads(1)
    with library.threads_apart(CPU):
        pass
    torch.set_num_threads(2)
    monkeypatch.setattr(library, "load", lambda device: "not built here (test)")
    with library.threads_apart(CPU):
        assert not changed(before)


def test_bound_threads_stay_bound():
    with library.threads_apart(CPU):
        pass
    before = masks()
    with library.threads_apart(CPU):
        (worker,) = changed(before)
    for cpu in sorted(before[worker])[:2]:  # the caller's, or not
        os.sched_setaffinity(worker, {cpu})
        assert KERNELS.threads_apart(2) == 0 and os.sched_getaffinity(worker) == {cpu}
        assert KERNELS.threads_together() == 0 and os.sched_getaffinity(worker) == {cpu}


def test_teams_that_change():
    """Another number of threads, a team that was ended, a thread that ended by itself."""
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        assert KERNELS.threads_apart(threads) == KERNELS.threads_together() == threads - 1
    assert KERNELS.threads_apart(2) == 1 and KERNELS.release_threads()
    assert KERNELS.threads_together() == 0
    assert KERNELS.threads_apart(3) == KERNELS.threads_together() == 2
    work(2), work(3)  # one thread ends, and another one comes
    assert KERNELS.threads_apart(3) >= 1 and KERNELS.threads_together() >= 1
    assert KERNELS.threads_apart(3) == KERNELS.threads_together() == 2


def test_a_forked_child_leaves_its_parents_threads_alone():
    before = masks()
    with library.threads_apart(CPU):
        if (pid := os.fork()) == 0:
            os._exit(KERNELS.threads_together())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert changed(before)
    assert not changed(before)


def test_pipelines_part_them_while_they_generate(monkeypatch):
    from twinflow_rt import load

    monkeypatch.setattr(threading, "active_count", lambda: 1)  # else calls end their team, and others' threads are new
    pipe, seen = load("demo", device="cpu", dtype="float32"), []
    call = lambda callback=None: pipe("a red circle", seed=0, height=32, width=32, output="pt", callback=callback)
    call()  # starts the team
    before = masks()
    call(lambda *_: seen.extend(changed(before)))
    assert len(seen) == 1 and not changed(before)
    with pytest.raises(ZeroDivisionError):
        call(lambda *_: 1 // 0)
    assert not changed(before)
    on = []
    monkeypatch.setattr(library, "threads_apart", lambda device: on.append(device) or pytest.fail("stop here"))
    monkeypatch.setattr(pipe, "device", torch.device("cuda"))
    with pytest.raises(pytest.fail.Exception):
        call()
    assert on == [torch.device("cuda")]  # for which nothing is done, see above
