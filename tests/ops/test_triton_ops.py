"""The Triton launchers as torch ops: the table's signatures, declared shapes and mutations, torch.compile.

Runs in Triton's interpreter; what the kernels compute is the matter of tests/kernels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benches.ops.case import SIZES, judge
from benches.ops.eight_bit_cases import QUANTIZED, eight_bit_cases
from benches.ops.op_cases import cases
from tests.kernels.conftest import interpreted, poisoned  # noqa: F401
from tests.registered import registered
from twinflow_rt import ops
from twinflow_rt.ops.implementations import IMPLEMENTATIONS
from twinflow_rt.ops.table import EAGER_QUANTIZED, quantizing

CASES = [
    case
    for case in (*cases(SIZES["tiny"], torch.float16, "cpu"), *eight_bit_cases(SIZES["tiny"], torch.float16, "cpu"))
    if "triton" in IMPLEMENTATIONS[case.op]
]
EPS = 1e-5


@pytest.fixture(scope="module")
def table():
    """op -> what a GPU program would call"""
    return {op: some["triton"].load() for op, some in IMPLEMENTATIONS.items() if "triton" in some}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_through_the_op_tables(table, case):
    eager = IMPLEMENTATIONS[case.op]["eager"].load()
    got, wanted = (case.read(call(*case.inputs())) for call in (table[case.op], eager))
    problem = judge(got, wanted, case.exact(*case.inputs()))
    assert problem is None, problem


def test_the_last_sandwich_norm_has_no_successor(table):
    x, w = torch.randn(2, 3, 16), torch.rand(16)
    total, h = table["residual_norm"](x, x, w, None, EPS)
    assert h is None
    torch.testing.assert_close(total, ops.residual_norm(x, x, w, None, EPS)[0])


def test_ops_keep_torchs_rules(table):
    o, x, w = torch.ops.twinflow, torch.randn(2, 3, 16), torch.rand(16)
    q, k, v = torch.randn(1, 5, 3, 2, 16).half().unbind(2)
    tables = (torch.rand(8), torch.rand(8), torch.rand(1, 3, 4), torch.rand(1, 3, 4))
    checked = set()

    def check(op, *args, **options):
        torch.library.opcheck(op, args, **options)
        checked.add(op.name().split("::")[1])

    check(o.triton_rms_norm.default, x, w, EPS)
    check(o.triton_layer_norm.default, x, None, EPS, w)
    check(o.triton_residual_norm.default, x, x.clone(), w, w, EPS)
    check(o.triton_residual_norm_alone.default, x, x.clone(), w, EPS)
    check(o.triton_residual_layer_norm.default, x, x.clone(), None, w, None, EPS)
    check(o.triton_qk_norm_rope_.default, torch.randn(2, 3, 48), *tables, 2, EPS)
    streams, weights = [torch.randn(1, 1, 48), torch.randn(1, 2, 48)], [torch.rand(8), torch.rand(8)]
    check(o.triton_joint_qk_norm_rope.default, streams, weights, weights, *tables[2:], 2, EPS)
    check(o.triton_attention.default, q, k, v, torch.tensor([3]))
    check(o.triton_attention_fp8.default, q, k, v, torch.tensor([3]))
    check(o.triton_linear_attention.default, q, k, v)
    check(o.triton_swiglu.default, x)
    check(o.triton_gelu_tanh.default, x)
    check(o.triton_x0_project.default, torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0.5)
    for to in QUANTIZED.values():
        check(o.triton_quantize_rows.default, x, to)
        check(o.triton_rms_norm_quantized.default, x, w, EPS, to)
        check(o.triton_layer_norm_quantized.default, x, None, EPS, w, to)
        check(o.triton_residual_norm_quantized.default, x, x.clone(), w, w, EPS, to)
        check(o.triton_residual_layer_norm_quantized.default, x, x.clone(), None, w, None, EPS, to)
        check(o.triton_swiglu_quantized.default, x, to)
        check(o.triton_gelu_tanh_quantized.default, x, to)
    check(o.triton_to_uint8.default, torch.randn(1, 3, 4, 4))
    image, latents = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 4, 6)
    tokens = torch.randn(2, 2, 3, 2, 2, 4).permute(0, 5, 1, 3, 2, 4)
    check(o.triton_x0_to_vae.default, latents, tokens, -1.0, w[:4], w[4:8], torch.bfloat16)
    check(o.triton_group_norm_silu.default, image, 2, w[:4], w[4:8], EPS)
    check(o.triton_rms_norm_silu.default, image, w[:4], EPS)
    check(o.triton_linear_swiglu.default, torch.randn(2, 3, 64).half(), torch.randn(10, 64).half())
    weight = (torch.zeros(5, 32, dtype=torch.uint8), torch.ones(5, 1).half(), None, torch.ones(5, 1), torch.ones(5))
    check(o.triton_linear_w4a8.default, torch.ones(2, 3, 64, dtype=torch.int8), w[:6].view(2, 3, 1), *weight, x.dtype)
    check(o.triton_linear_w4a16.default, torch.randn(2, 3, 64).half(), *weight)
    floats = (torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 2).to(torch.float8_e4m3fn), None, torch.ones(8, 1))
    check(o.triton_linear_nvfp4.default, torch.randn(2, 3, 32).half(), *floats, torch.ones(8), test_utils=(
        "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"  # test_schema compares no float8
    ))  # fmt: skip
    assert checked == registered("triton")


def test_one_graph_under_torch_compile(table):
    """No graph break, and the in-place op's effect survives functionalization."""
    x, w = torch.randn(2, 3, 48), torch.rand(48)
    tables = (torch.rand(8), torch.rand(8), torch.rand(1, 3, 4), torch.rand(1, 3, 4), 2, EPS)

    def block(ops, x):
        total, h = ops["residual_norm"](ops["rms_norm"](x, w, EPS), x, w, w, EPS)
        q, k, v = ops["qk_norm_rope"](h.clone(), *tables)
        return total, q + k, v * 2

    expected = block({name: getattr(ops, name) for name in ("rms_norm", "residual_norm", "qk_norm_rope")}, x)
    compiled = torch.compile(lambda x: block(table, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_one_graph_of_a_quantized_block_under_torch_compile(table):
    """Rows travel from norm and activation to the products as a tuple: no graph break."""
    quantized = replace(EAGER_QUANTIZED, **{op: table[op] for op in vars(EAGER_QUANTIZED) if op in table})
    input_ops = quantizing(ops.EAGER, quantized, torch.int8)
    x, w, weight = torch.randn(2, 3, 48), torch.rand(48), ops.quantize_rows(torch.randn(64, 48), torch.int8)

    def block(of, x):
        total, h = of.residual_norm(x, x + 1, w, w, EPS)
        y = quantized.linear_quantized(h.values, h.scales, *weight, None, h.dtype)
        return total, of.swiglu(y).values.float()

    expected = block(quantizing(ops.EAGER, EAGER_QUANTIZED, torch.int8), x)
    compiled = torch.compile(lambda x: block(input_ops, x), backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(x), expected, strict=True):
        assert (got - wanted).abs().max() <= (1 if wanted is expected[1] else 1e-5)
