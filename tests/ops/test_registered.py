"""No op without its tests: what torch.compile makes of every op registered with torch, and whether the GPU tests and
the GPU kit have a case of every op and implementation there is. Whoever adds one meets these first.

Triton's kernels run in its interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from benches.gpu import kernels, kit, rivals
from benches.ops.case import SIZES, judge
from benches.ops.eight_bit_cases import aimed, eight_bit_cases
from benches.ops.op_cases import cases
from tests.gpu import test_implementations as gpu
from tests.kernels.conftest import interpreted, poisoned  # noqa: F401
from tests.registered import registered
from twinflow_rt import ops
from twinflow_rt.ops import OpTable, Target
from twinflow_rt.ops.implementations import FP8, IMPLEMENTATIONS, RAGGED
from twinflow_rt.ops.native import library
from twinflow_rt.ops.table import QuantizedOps

TINY = SIZES["tiny"]
OPS = {f.name for table in (OpTable, QuantizedOps) for f in fields(table)} | {RAGGED, FP8}


def everything(dtype=torch.float32):
    return (*cases(TINY, dtype, "cpu"), *eight_bit_cases(TINY, dtype, "cpu"))


def targets(graph: GraphModule) -> Iterator[str]:
    """Names of the `twinflow::` ops in a graph, those included that functionalization wrapped."""
    for node in graph.graph.nodes:
        for found in (node.target, *node.args):
            if isinstance(found, torch._ops.OpOverload) and found.namespace == "twinflow":
                yield found.name().split("::")[1].split(".")[0]


@pytest.mark.parametrize("implementation", ["native", "triton"])
def test_every_registered_op_under_torch_compile(implementation):
    """Each case becomes one graph, without a break, that holds the op and gives what eager gives."""
    if implementation == "native" and (reason := library.unavailable_reason("cpu")):
        pytest.skip(reason)
    seen: set[str] = set()

    def keep(graph, inputs):
        seen.update(targets(graph))
        return make_boxed_func(graph.forward)

    for case in everything(torch.float32 if implementation == "native" else torch.float16):
        some = IMPLEMENTATIONS[rivals.table_name(case)]
        if implementation not in some or (implementation == "native" and "float8" in case.name):
            continue
        torch._dynamo.reset()
        call = some[implementation].load()
        compiled = torch.compile(lambda *a, call=call: call(*a), backend=aot_autograd(fw_compiler=keep), fullgraph=True)
        with torch.no_grad():
            got, eager = (case.read(one(*case.inputs())) for one in (compiled, some["eager"].load()))
        problem = judge(got, eager, case.exact(*case.inputs()))
        assert problem is None, (case.name, problem)
    if implementation == "triton":  # the last block's, which no norm follows
        x, w, call = torch.randn(1, 3, 16), torch.rand(16), IMPLEMENTATIONS["residual_norm"]["triton"].load()
        last = torch.compile(lambda x: call(x, x, w, None, 1e-5)[0], backend=aot_autograd(fw_compiler=keep))
        torch.testing.assert_close(last(x), ops.residual_norm(x, x, w, None, 1e-5)[0])
    assert seen == registered(implementation)


def test_every_op_has_a_case():
    """The kit checks and times what cases there are, in the parts for the three kinds."""
    assert {rivals.table_name(case) for case in everything()} == OPS == set(IMPLEMENTATIONS)
    for dry in (False, True):
        timed = [command for part in kit.parts(Path("out"), dry) for command in part.commands if "--kinds" in command]
        kinds = {command[command.index("--kinds") + 1] for command in timed}
        assert kinds == set(kernels.KINDS) == {kernels.kind_of(case) for case in everything()}


def test_every_implementation_of_a_gpu_is_tested_on_one():
    """By its values, in a CUDA graph and under torch.compile: all but what says of itself that it is the CPU's."""
    found = set()
    for case in everything():
        target = aimed(case, Target("cuda", torch.bfloat16, arch=90))
        for name, implementation in IMPLEMENTATIONS[rivals.table_name(case)].items():
            if name != "eager" and "runs on the CPU" not in (implementation.refuses(target) or ""):
                found.add((case.name, name))
    assert set(gpu.PAIRS) == found
    for test in (gpu.test_against_float64, gpu.test_in_a_cuda_graph, gpu.test_under_torch_compile):
        assert any(mark.args[1] is gpu.PAIRS for mark in test.pytestmark)
