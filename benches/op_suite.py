"""One op after another on this machine: every implementation that serves it, beside the eager reference.

    pytest benches/bench_norm.py --benchmark-only -o python_files='bench_*.py'

On the GPU where there is one, at Z-Image's sizes for 1024 x 1024; otherwise on the CPU at 256 x 256. Each is
checked against float64 arithmetic before it is timed. Inputs stay in the cache between rounds: the GPU kit
(benches/gpu.sh) flushes it and adds ceilings and rivals.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from twinflow_rt.bench.op_cases import SIZES, cases, judge
from twinflow_rt.bench.timing import synchronize
from twinflow_rt.ops import EAGER
from twinflow_rt.ops.select import IMPLEMENTATIONS, Target

GPU = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if GPU else "cpu"), torch.bfloat16 if GPU else torch.float32
SIZE = "z-image 1024x1024" if GPU else "z-image 256x256"


def suite(*ops: str) -> Callable:
    """The benchmark function of a stem's ops, for a module to name `test_...`."""
    target = Target.of_network(SIZES[SIZE], DEVICE, DTYPE)
    serving = [(op, i) for op in ops for i in IMPLEMENTATIONS[op].values() if i.refuses(target) is None]

    @pytest.mark.parametrize("op, implementation", [pytest.param(op, i, id=f"{op}-{i.name}") for op, i in serving])
    def run(benchmark, op, implementation):
        case = next(c for c in cases(SIZES[SIZE], DTYPE, DEVICE) if c.op == op)
        call = implementation.load()
        eager = getattr(EAGER, op)(*case.inputs())
        assert (problem := judge(call(*case.inputs()), eager, case.exact(*case.inputs()))) is None, problem
        benchmark.group = f"{op}, {SIZE}, {str(DTYPE).removeprefix('torch.')} on {DEVICE}"
        benchmark.extra_info["bytes"] = case.bytes
        args = case.inputs()
        with torch.inference_mode():
            benchmark.pedantic(lambda: (call(*args), synchronize(DEVICE)), rounds=20, warmup_rounds=3)

    return run
