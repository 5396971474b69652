"""What only a GPU can show of the native kernels: full sizes, streams, CUDA graphs, torch.compile."""

from __future__ import annotations

import pytest
import torch

from twinflow_rt import library, native, ops
from twinflow_rt.bench.op_cases import SIZES, cases, judge
from twinflow_rt.ops.select import NATIVE

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def usable():
    if reason := library.unusable_reason():
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [n for n in SIZES if n != "tiny"])
@pytest.mark.parametrize("op", NATIVE)
def test_full_size(op, size, dtype):
    (case,) = (c for c in cases(SIZES[size], dtype, "cuda") if c.op == op)
    got = getattr(native, op)(*case.inputs())
    problem = judge(got, getattr(ops.EAGER, op)(*case.inputs()), case.exact(*case.inputs()))
    assert problem is None, problem


def test_on_a_stream_of_its_own_and_in_a_graph():
    x, w = torch.randn(2, 64, 256, device="cuda"), torch.rand(256, device="cuda")
    eager = ops.rms_norm(x, w, 1e-5)
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        captured = native.rms_norm(static, w, 1e-5)
    static.copy_(x)
    graph.replay()
    torch.testing.assert_close(captured, eager)


def test_under_torch_compile():
    x, w = torch.randn(2, 64, 256, device="cuda"), torch.rand(256, device="cuda")
    compiled = torch.compile(lambda x: native.residual_norm(native.rms_norm(x, w, 1e-5), x, w, w, 1e-5), fullgraph=True)
    total, h = compiled(x)
    expected = ops.residual_norm(ops.rms_norm(x, w, 1e-5), x, w, w, 1e-5)
    torch.testing.assert_close((total, h), expected)
