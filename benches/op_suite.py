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

from benches.ops.case import SIZES, judge
from benches.ops.eight_bit_cases import eight_bit_cases, implementations
from benches.ops.op_cases import cases
from twinflow_rt import ops as references
from twinflow_rt.ops import Target
from twinflow_rt.runtime.timer import synchronize

GPU = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if GPU else "cpu"), torch.bfloat16 if GPU else torch.float32
SIZE = "z-image 1024x1024" if GPU else "z-image 256x256"


def suite(*ops: str) -> Callable:
    """The benchmark function of a stem's ops, for a module to name `test_...`; of 8-bit networks' in both dtypes."""
    target = Target.of_network(SIZES[SIZE], DEVICE, DTYPE)
    sized = SIZES[SIZE], DTYPE, DEVICE
    table = [c for c in (*cases(*sized), *eight_bit_cases(*sized)) if c.op in ops and "ragged" not in c.name]
    calls = [(c, name, i) for c in table for name, i in implementations(c, target)[0].items()]
    calls += [(c, "eager", getattr(references, c.op)) for c in table]

    @pytest.mark.parametrize("case, call", [pytest.param(c, i, id=f"{c.name}-{name}") for c, name, i in calls])
    def run(benchmark, case, call):
        got, eager = (case.read(one(*case.inputs())) for one in (call, getattr(references, case.op)))
        assert (problem := judge(got, eager, case.exact(*case.inputs()))) is None, problem
        benchmark.group = f"{case.name}, {SIZE}, {str(DTYPE).removeprefix('torch.')} on {DEVICE}"
        benchmark.extra_info["bytes"] = case.bytes
        args = case.inputs()
        with torch.inference_mode():
            benchmark.pedantic(lambda: (call(*args), synchronize(DEVICE)), rounds=20, warmup_rounds=3)

    return run
