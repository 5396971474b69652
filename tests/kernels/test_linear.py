"""Rowwise quantization, and what its scales are for."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, QUANTIZED, draw, judge_quantized, strided

from twinflow_rt import ops
from twinflow_rt.kernels import launch, linear


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 37), (3, 3, 199), (1, 2, 1128), (2, 0, 16)])
def test_quantize_rows(shape, dtype, quantized):
    x = draw(*shape, dtype=dtype)
    judge_quantized(linear.quantize_rows(strided(x), quantized), ops.quantize_rows(x, quantized), x.double())


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_rows_of_zeros_and_of_every_magnitude(quantized):
    x = torch.cat([torch.zeros(1, 8), draw(5, 8) * torch.tensor([1e-30, 1e-9, 1.0, 1e9, 1e30])[:, None]])
    values, scales = linear.quantize_rows(x, quantized)
    wanted, wanted_scales = ops.quantize_rows(x, quantized)
    assert torch.equal(values.float(), wanted.float()) and not values[:2].float().any()
    torch.testing.assert_close(scales, wanted_scales)


def test_int8_rounds_halves_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 0.0]])
    assert linear.quantize_rows(x, torch.int8)[0].tolist() == [[127, 0, 2, 2, 0, -2, -126, 0]]


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_linear_quantized(quantized):
    """The product is exact in what the rows stand for."""
    x, w, bias = draw(3, 5, 32, dtype=torch.bfloat16), draw(48, 32), draw(48)
    rows, weights = ops.quantize_rows(x, quantized), ops.quantize_rows(w, quantized)
    a, b = (values.double() * scales.double() for values, scales in (rows, weights))
    got = ops.linear_quantized(*rows, *weights, bias, torch.float32)
    torch.testing.assert_close(got.double(), a @ b.t() + bias.double(), rtol=1e-5, atol=1e-5)


def test_scaled_mm_takes_the_rows_as_they_are():
    x, w = draw(3, 5, 32, dtype=torch.bfloat16), draw(48, 32)
    (a, a_scales), (b, b_scales) = (ops.quantize_rows(v, torch.float8_e4m3fn) for v in (x.flatten(0, 1), w))
    got = torch._scaled_mm(a, b.t(), a_scales, b_scales.t(), out_dtype=torch.float32)
    torch.testing.assert_close(got, ops.linear_quantized(a, a_scales, b, b_scales, None, torch.float32))


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="float8_e4m3fn or int8"):
        linear.quantize_rows(draw(2, 8), torch.float8_e5m2)
    with pytest.raises(ValueError, match="float8_e4m3fn or int8"):
        ops.quantize_rows(draw(2, 8), torch.float16)
    with pytest.raises(ValueError, match="16384"):
        linear.quantize_rows(draw(1, launch.MAX_WIDTH + 1), torch.int8)
    monkeypatch.setattr(launch, "arch", lambda x: 86)
    with pytest.raises(ValueError, match=r"needs compute capability 8\.9"):
        linear.quantize_rows(draw(2, 8), torch.float8_e4m3fn)
