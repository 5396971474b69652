"""Feed-forward activations against float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, QUANTIZED, draw, judge, judge_quantized, strided

from benches.ops.case import exact_gelu, exact_swiglu
from twinflow_rt import ops
from twinflow_rt.kernels import launch, mlp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 37, 199, 760, 1128])
def test_swiglu(dtype, hidden):
    x = 4 * draw(2, 3, 2 * hidden, dtype=dtype)
    judge(mlp.swiglu(strided(x)), ops.swiglu(x), exact_swiglu(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 199, 760, 1128])
def test_gelu_tanh(dtype, width):
    x = 2 * draw(2, 3, width, dtype=dtype)
    judge(mlp.gelu_tanh(strided(x)), ops.gelu_tanh(x), exact_gelu(x))


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 74, 760])
def test_quantized(dtype, width, quantized):
    x = 4 * draw(2, 3, width, dtype=dtype)
    judge_quantized(mlp.swiglu_quantized(strided(x), quantized), ops.swiglu_quantized(x, quantized), exact_swiglu(x))
    got = mlp.gelu_tanh_quantized(strided(x), quantized)
    judge_quantized(got, ops.gelu_tanh_quantized(x, quantized), exact_gelu(x))


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_wide(dtype, quantized):
    """Rows that one program does not hold, as Qwen2.5-VL's MLP has."""
    x = 4 * draw(1, 2, 2 * 18944, dtype=dtype)
    x[0, 1, ::2] = 0
    x[0, 0, 18943], x[0, 0, -1] = 100, 100  # the largest of its row is the last
    judge_quantized(mlp.swiglu_quantized(strided(x), quantized), ops.swiglu_quantized(x, quantized), exact_swiglu(x))
    x = x[..., : launch.MAX_WIDTH + 1]
    got = mlp.gelu_tanh_quantized(strided(x), quantized)
    judge_quantized(got, ops.gelu_tanh_quantized(x, quantized), exact_gelu(x))


@pytest.mark.parametrize("shape", [(4,), (0, 3, 8), (5, 6), (2, 3, 4, 10)])
def test_ranks_and_empty_rows(shape):
    x = draw(*shape)
    judge(mlp.swiglu(x), ops.swiglu(x), exact_swiglu(x))


@pytest.mark.parametrize("op", ["swiglu", "gelu_tanh"])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_ends_of_the_range(op):
    x = torch.tensor([[-1e30, -200.0, -88.5, -20.0, 0.0, 88.5, 200.0, 1e12, 1, 1, 1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(getattr(mlp, op)(x), getattr(ops, op)(x), atol=1e-30, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, hidden, inner", [(1, 1, 64), (37, 199, 64), (130, 70, 144), (1100, 40, 64), (5, 6, 7), (0, 8, 64)]
)
@pytest.mark.parametrize("arch", [80, 90])
def test_linear_swiglu(monkeypatch, arch, rows, hidden, inner, dtype):
    monkeypatch.setattr(mlp.launch, "arch", lambda x: arch)
    x, weight = draw(1, rows, inner, dtype=dtype), draw(2 * hidden, inner, dtype=dtype)
    exact = exact_swiglu(x.double() @ weight.double().t())
    once = ops.linear_swiglu(x.float(), weight.float()).to(dtype)  # the kernel does not round the products
    judge(mlp.linear_swiglu(strided(x), weight), once, exact)


def test_refusals():
    with pytest.raises(ValueError, match="does not fit"):
        mlp.linear_swiglu(draw(2, 4, dtype=torch.float16), draw(6, 5, dtype=torch.float16))
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        mlp.linear_swiglu(draw(2, 4), draw(6, 4))
    with pytest.raises(ValueError, match="even"):
        mlp.swiglu(draw(2, 3))
    with pytest.raises(ValueError, match="int64"):
        mlp.swiglu(torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 10240])
def test_config(dtype, width):
    c = mlp.config(width, dtype)
    assert c.block <= 2 * width and c.block * dtype.itemsize <= 16 * 32 * c.warps and c.warps <= 4
