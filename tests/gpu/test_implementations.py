"""Every implementation that a GPU program may be given: full sizes, CUDA graphs, torch.compile.

What a machine cannot run is skipped with the sentence selection would print.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benches.ops.case import SIZES, judge
from benches.ops.eight_bit_cases import QUANTIZED, aimed, dequantized, eight_bit_cases
from benches.ops.op_cases import cases
from twinflow_rt import ops
from twinflow_rt.ops import Target
from twinflow_rt.ops.backends import BACKENDS
from twinflow_rt.ops.implementations import IMPLEMENTATIONS, RAGGED

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OF_CPU = ("eager", "native")
THIRD_PARTY = [name for name, backend in BACKENDS.items() if backend.module]


def table(size, dtype, device):
    """name -> case, of all there are."""
    where = SIZES[size], dtype, device
    return {case.name: case for case in (*cases(*where), *eight_bit_cases(*where))}


def key(case):
    """Of `IMPLEMENTATIONS`."""
    return RAGGED if "ragged" in case.name else case.op


# every case with every implementation of it that GPUs have
PAIRS = [
    (name, implementation)
    for name, case in table("tiny", torch.float32, "cpu").items()
    for implementation in IMPLEMENTATIONS[key(case)]
    if implementation not in OF_CPU
]


def prepared(name, implementation, size, dtype):
    case = table(size, dtype, "cuda")[name]
    chosen = IMPLEMENTATIONS[key(case)][implementation]
    if reason := chosen.refuses(aimed(case, Target.of_network(SIZES[size], torch.device("cuda"), dtype))):
        pytest.skip(reason)
    return case, chosen.load()


def check(case, got, inputs):
    eager = IMPLEMENTATIONS[case.op]["eager"].load()(*inputs)
    problem = judge(case.read(got), case.read(eager), case.exact(*case.inputs()))
    assert problem is None, problem


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name, implementation", PAIRS)
def test_against_float64(name, implementation, size, dtype):
    case, call = prepared(name, implementation, size, dtype)
    check(case, call(*case.inputs()), case.inputs())


@pytest.mark.parametrize("name, implementation", PAIRS)
def test_in_a_cuda_graph(name, implementation):
    """Captured on one set of values, replayed on another."""
    case, call = prepared(name, implementation, "tiny", torch.bfloat16)
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
    check(case, captured, fresh)


@pytest.mark.parametrize("name, implementation", PAIRS)
def test_under_torch_compile(name, implementation):
    case, call = prepared(name, implementation, "tiny", torch.bfloat16)
    compiled = torch.compile(lambda *args: call(*args), fullgraph=implementation not in THIRD_PARTY)
    check(case, compiled(*case.inputs()), case.inputs())


@pytest.mark.parametrize("to", QUANTIZED.values())
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_rows_of_the_widest_text_encoder(implementation, to):
    """Qwen2.5-VL's MLP, whose rows Triton's kernel does not hold in registers."""
    target = replace(Target.of(torch.device("cuda"), torch.bfloat16), quantized=to)
    chosen = IMPLEMENTATIONS["swiglu_quantized"][implementation]
    if reason := chosen.refuses(target):
        pytest.skip(reason)
    x = 2 * torch.randn(300, 2 * 18944, device="cuda", dtype=torch.bfloat16)
    a, b = x.double().chunk(2, -1)
    got, eager = (dequantized(call(x, to))[0] for call in (chosen.load(), ops.swiglu_quantized))
    problem = judge(got, eager, [a * a.sigmoid() * b])
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
