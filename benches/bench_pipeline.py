"""Whole calls, prompt to PIL image: by evaluations, by batch, against the unfolded eager network.

    make bench        (or: pytest benches/bench_pipeline.py --benchmark-only -o python_files='bench_*.py')

Nothing is timed whose images differ from the eager network's.
"""

from __future__ import annotations

import pytest

from twinflow_rt.bench import correctness, peers
from twinflow_rt.bench.workload import Workload, batch_of, outputs


@pytest.fixture(scope="module")
def eager(pipe):
    return peers.unfolded(pipe)


@pytest.mark.parametrize("count", [1, 4], ids=["1 image", "4 images"])
@pytest.mark.parametrize("nfe", [1, 2, 4])
@pytest.mark.parametrize("program", ["compiled", "eager"])
def test_call(benchmark, pipe, eager, program, nfe, count):
    height, width = pipe.sizes.resolve(None, None)
    work = Workload(batch_of(None, count), height, width, seed=0, nfe=nfe)
    reference = outputs(lambda kind: work.call(eager, kind))
    measured = {"compiled": pipe, "eager": eager}[program]
    got = outputs(lambda kind: work.call(measured, kind))
    # each evaluation reads, and so amplifies, the rounding of those before it: the strict rule is for one
    tolerance = None if nfe == 1 else 1e-4
    verdict = correctness.judge(got, reference, dtype="float32", tolerance=tolerance)
    assert verdict.passed, verdict.reason
    benchmark.group = f"whole calls, {count} images, {nfe} evaluation(s) each"
    benchmark(work.call, measured)


@pytest.mark.parametrize("order", ["staying", "switching"])
def test_schedules(benchmark, pipe, order):
    """The same six calls; "switching": each takes another schedule than the call before."""
    height, width = pipe.sizes.resolve(None, None)
    calls = {nfe: Workload(batch_of(None, 1), height, width, seed=0, nfe=nfe) for nfe in (1, 2, 4)}
    turns = {"staying": (1, 1, 2, 2, 4, 4), "switching": (1, 2, 4, 1, 2, 4)}[order]
    for work in calls.values():
        work.call(pipe)  # the first call of a schedule folds it
    benchmark.group = "six calls at 1, 2 and 4 evaluations"
    benchmark(lambda: [calls[nfe].call(pipe) for nfe in turns])
