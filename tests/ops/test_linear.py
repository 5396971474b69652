"""Linear layers of the CPU against float64: packed, upcast and int8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from twinflow_rt.ops import linear_quantized, quantize_rows
from twinflow_rt.ops.linear import int8_limit, linear_int8, linear_packed, linear_upcast, pack, quantize_weight

SHAPES = [(1, 1, 5), (37, 199, 144), (199, 37, 760), (64, 432, 1128)]  # rows, outputs, inputs


def case(m, n, k, dtype):
    g = torch.Generator().manual_seed(m + n + k)
    x, w, b = (torch.randn(*shape, generator=g).to(dtype) for shape in ((2, m, k), (n, k), (n,)))
    return x, w * k**-0.5, b


def error(y, x, w, b):
    return float((y.double() - F.linear(x.double(), w.double(), b if b is None else b.double())).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["packed", "upcast"])
def test_no_less_exact_than_torch(shape, dtype, op):
    x, w, b = case(*shape, dtype)
    for bias in (b, None):
        y = linear_packed(x, pack(w), bias) if op == "packed" else linear_upcast(x, w, bias)
        assert y.dtype == dtype and y.shape == (*x.shape[:-1], len(w))
        bar = 1e-6 if dtype == torch.float32 else 2**-9  # float32 sums of another order; one bfloat16 rounding
        scale = float(F.linear(x.double().abs(), w.double().abs()).max())
        assert error(y, x, w, bias) <= max(2 * error(F.linear(x, w, bias), x, w, bias), bar * scale)


def test_packed_weights_take_strided_and_empty_rows_and_come_back():
    x, w, b = case(37, 199, 144, torch.float32)
    packed = pack(w)
    assert torch.equal(packed.to_dense(), w) and packed.nbytes == w.nbytes
    strided = torch.randn(2, 144, 37).transpose(1, 2)
    assert error(linear_packed(strided, packed, b), strided, w, b) < 1e-5
    assert linear_packed(x[:, :0], packed, b).shape == (2, 0, 199)
    assert torch.equal(pack(w.t().contiguous().t()).to_dense(), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_its_reference(shape, dtype):
    """Products are exact in int32, so only the rounding of sums, in float32, and of the result may differ."""
    x, w, b = case(*shape, dtype)
    values, scales = quantize_weight(w, int8_limit(torch.cpu.get_capabilities()))
    y = linear_int8(x, values, scales, b)
    reference = linear_quantized(*quantize_rows(x, torch.int8), values, scales, b, dtype)
    assert y.dtype == dtype and y.shape == reference.shape
    step = 1e-5 if dtype == torch.float32 else 2**-8
    assert (y.float() - reference.float()).abs().max() <= step * reference.float().abs().max()


def test_int8_error_is_that_of_8_bits():
    """Rounding to 127 levels of the row's maximum: uniform errors of relative size about 1e-2 for normal data."""
    x, w, _ = case(199, 432, 1128, torch.float32)
    y = linear_int8(x, *quantize_weight(w), None)
    exact = F.linear(x.double(), w.double())
    assert (y.double() - exact).norm() / exact.norm() < 0.015


def test_each_row_has_its_own_scale():
    x, w, _ = case(8, 64, 144, torch.float32)
    spread = x * torch.logspace(-6, 6, 8)[:, None]
    a, b = linear_int8(x, *quantize_weight(w), None), linear_int8(spread, *quantize_weight(w), None)
    relative = (b / torch.logspace(-6, 6, 8)[:, None] - a).abs().max() / a.abs().max()
    assert relative < 1e-2
    assert not linear_int8(torch.zeros(3, 144), *quantize_weight(w), None).any()
    assert linear_int8(x[:, :0], *quantize_weight(w), None).shape == (2, 0, 64)


def test_weights_quantize_to_the_limit_and_back():
    w = torch.randn(64, 144)
    for limit in (127, 63):
        values, scales = quantize_weight(w, limit)
        assert values.dtype == torch.int8 and int(values.abs().max()) == limit and scales.shape == (64, 1)
        assert ((values * scales - w).abs() <= scales / 2 * 1.001).all()
    values, scales = quantize_weight(torch.zeros(2, 8))
    assert not values.any() and torch.isfinite(scales).all()


def test_saturating_cpus_keep_a_bit():
    assert int8_limit({"avx512_vnni": True}) == int8_limit({"avx_vnni": True}) == 127
    assert int8_limit({"avx2": True, "avx512_vnni": False}) == 63
