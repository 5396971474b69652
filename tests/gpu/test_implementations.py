"""Every implementation that a GPU program may be given: full sizes, CUDA graphs, torch.compile.

What a machine cannot run is skipped with the sentence selection would print.
"""

from __future__ import annotations

import pytest
import torch

from twinflow_rt import ops
from twinflow_rt.bench.op_cases import SIZES, cases, judge
from twinflow_rt.bench.standalone_cases import implementations, standalone
from twinflow_rt.ops import EAGER
from twinflow_rt.ops.backends import BACKENDS
from twinflow_rt.ops.select import FP8, IMPLEMENTATIONS, RAGGED, ROW_OPS, Target

pytestmark = pytest.mark.gpu
TABLE = {op: some for op, some in IMPLEMENTATIONS.items() if op not in (*ROW_OPS, FP8)}
PAIRS = [(op, name) for op, some in TABLE.items() for name in some if name not in ("eager", "native")]
STANDALONE = [c.name for c in standalone(SIZES["tiny"], torch.float32, "cpu")]
THIRD_PARTY = [name for name, backend in BACKENDS.items() if backend.module]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def prepared(op, name, size, dtype):
    target = Target.of(torch.device("cuda"), dtype, SIZES[size].head_dim)
    implementation = IMPLEMENTATIONS[op][name]
    if reason := implementation.refuses(target):
        pytest.skip(reason)
    wanted = (op.removesuffix(".ragged"), op == RAGGED)
    (case,) = (c for c in cases(SIZES[size], dtype, "cuda") if (c.op, "ragged" in c.name) == wanted)
    return case, implementation.load()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op, name", PAIRS)
def test_against_float64(op, name, size, dtype):
    case, call = prepared(op, name, size, dtype)
    problem = judge(call(*case.inputs()), getattr(EAGER, case.op)(*case.inputs()), case.exact(*case.inputs()))
    assert problem is None, problem


@pytest.mark.parametrize("op, name", PAIRS)
def test_in_a_cuda_graph(op, name):
    """Captured on one set of values, replayed on another."""
    case, call = prepared(op, name, "tiny", torch.bfloat16)
    call(*case.inputs())  # what compiles or plans on first use does so outside of the graph
    torch.cuda.synchronize()
    static = case.inputs()
    fresh = case.inputs()
    for x in tensors(static):
        x.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*static)
    for x, value in zip(tensors(static), tensors(fresh), strict=True):
        x.copy_(value)
    graph.replay()
    problem = judge(captured, getattr(EAGER, case.op)(*fresh), case.exact(*case.inputs()))
    assert problem is None, problem


@pytest.mark.parametrize("op, name", PAIRS)
def test_under_torch_compile(op, name):
    case, call = prepared(op, name, "tiny", torch.bfloat16)
    compiled = torch.compile(lambda *args: call(*args), fullgraph=name not in THIRD_PARTY)
    problem = judge(compiled(*case.inputs()), getattr(EAGER, case.op)(*case.inputs()), case.exact(*case.inputs()))
    assert problem is None, problem


def tensors(value):
    """All distinct storages of nested tuples, as tensors: q, k and v may be views of one."""
    found = {}
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, tuple):
            found |= {x.data_ptr(): x for x in tensors(item)}
        elif isinstance(item, torch.Tensor):
            found[item.data_ptr()] = item
    return list(found.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STANDALONE)
def test_kernels_beside_the_table(name, size, dtype):
    (case,) = (c for c in standalone(SIZES[size], dtype, "cuda") if c.name == name)
    usable, refused = implementations(case, Target.of(torch.device("cuda"), dtype))
    if not usable:
        pytest.skip(str(refused))
    for call in usable.values():
        got, eager = (case.read(one(*case.inputs())) for one in (call, getattr(ops, case.op)))
        assert (problem := judge(got, eager, case.exact(*case.inputs()))) is None, problem
