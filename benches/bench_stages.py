"""Each stage of a call on its own, for one image and for four.

    make bench        (or: pytest benches/bench_stages.py --benchmark-only -o python_files='bench_*.py')

`twinflow-rt bench` measures the same stages in turns; here they are separate, for profiling one.
"""

from __future__ import annotations

import pytest

from twinflow_rt.bench.workload import STAGES, Workload, batch_of, stages


@pytest.fixture(scope="module", params=[1, 4], ids=["1 image", "4 images"])
def calls(request, pipe):
    height, width = pipe.sizes.resolve(None, None)
    return stages(pipe, Workload(batch_of(None, request.param), height, width, seed=0, nfe=1))


@pytest.mark.benchmark(group="stages")
@pytest.mark.parametrize("stage", STAGES)
def test_stage(benchmark, calls, stage):
    benchmark(calls[stage])
