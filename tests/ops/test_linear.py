"""Linear layers of the CPU against float64: packed, upcast and int8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from twinflow_rt.ops import linear_quantized, quantize_rows
from twinflow_rt.ops.linear import (
    int8_mm,
    int8_sums,
    linear_packed,
    linear_upcast,
    pack,
    packing_refuses,
    scaled_mm,
)

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
SHAPES = [(1, 1, 5), (37, 199, 144), (199, 37, 760), (64, 432, 1128)]  # rows, outputs, inputs


def case(m, n, k, dtype):
    g = torch.Generator().manual_seed(m + n + k)
    x, w, b = (torch.randn(*shape, generator=g).to(dtype) for shape in ((2, m, k), (n, k), (n,)))
    return x, w * k**-0.5, b


def linear_int8(x, values, scales, bias):
    """int8 as a network has it: rows quantized as they come."""
    return int8_mm(*quantize_rows(x, torch.int8), values, scales, bias, x.dtype)


def error(y, x, w, b):
    return float((y.double() - F.linear(x.double(), w.double(), b if b is None else b.double())).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["packed", "upcast"])
def test_no_less_exact_than_torch(shape, dtype, op):
    if op == "packed" and (reason := packing_refuses(CPU, dtype)):
        pytest.skip(reason)
    x, w, b = case(*shape, dtype)
    for bias in (b, None):
        y = linear_packed(x, pack(w), bias) if op == "packed" else linear_upcast(x, w, bias)
        assert y.dtype == dtype and y.shape == (*x.shape[:-1], len(w))
        bar = 1e-6 if dtype == torch.float32 else 2**-9  # float32 sums of another order; one bfloat16 rounding
        scale = float(F.linear(x.double().abs(), w.double().abs()).max())
        assert error(y, x, w, bias) <= max(2 * error(F.linear(x, w, bias), x, w, bias), bar * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_refused_where_onednn_refuses_it(dtype):
    """bfloat16 on CPUs that cannot convert it."""
    weight = torch.ones(8, 8, dtype=dtype)
    if packing_refuses(CPU, dtype):
        with pytest.raises(RuntimeError, match="needs the cpu support"):
            pack(weight)
    else:
        assert torch.equal(pack(weight).to_dense(), weight)


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
    values, scales = quantize_rows(w, torch.int8)
    y = linear_int8(x, values, scales, b)
    reference = linear_quantized(*quantize_rows(x, torch.int8), values, scales, b, dtype)
    assert y.dtype == dtype and y.shape == reference.shape
    step = 1e-5 if dtype == torch.float32 else 2**-8
    assert (y.float() - reference.float()).abs().max() <= step * reference.float().abs().max()


def test_int8_error_is_that_of_8_bits():
    """Rounding to 127 levels of the row's maximum: uniform errors of relative size about 1e-2 for normal data."""
    x, w, _ = case(199, 432, 1128, torch.float32)
    y = linear_int8(x, *quantize_rows(w, torch.int8), None)
    exact = F.linear(x.double(), w.double())
    assert (y.double() - exact).norm() / exact.norm() < 0.015


def test_each_row_has_its_own_scale():
    x, w, _ = case(8, 64, 144, torch.float32)
    spread = x * torch.logspace(-6, 6, 8)[:, None]
    weight = quantize_rows(w, torch.int8)
    a, b = linear_int8(x, *weight, None), linear_int8(spread, *weight, None)
    relative = (b / torch.logspace(-6, 6, 8)[:, None] - a).abs().max() / a.abs().max()
    assert relative < 1e-2
    assert not linear_int8(torch.zeros(3, 144), *weight, None).any()
    assert linear_int8(x[:, :0], *weight, None).shape == (2, 0, 64)


def test_weights_quantize_and_back():
    w = torch.randn(64, 144)
    values, scales = quantize_rows(w, torch.int8)
    assert values.dtype == torch.int8 and int(values.abs().max()) == 127 and scales.shape == (64, 1)
    assert ((values * scales - w).abs() <= scales / 2 * 1.001).all()
    values, scales = quantize_rows(torch.zeros(2, 8), torch.int8)
    assert not values.any() and torch.isfinite(scales).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_its_definition(shape, dtype):
    """The specification against float64: exact products of the dequantized operands, one rounding."""
    x, w, b = case(*shape, dtype)
    (values, scales), weight = quantize_rows(x, FP8), quantize_rows(w, FP8)
    y = linear_quantized(values, scales, *weight, b, dtype)
    exact = F.linear(values.double() * scales.double(), weight[0].double() * weight[1].double(), b.double())
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * 4 * exact.abs().max()


def test_fp8_error_is_that_of_4_significant_bits():
    """e4m3 rounds to 3 bits after the point: errors uniform up to 2^-4 of a value, so about 2^-4 / sqrt(3) rms each."""
    x, w, _ = case(199, 432, 1128, torch.float32)
    y = linear_quantized(*quantize_rows(x, FP8), *quantize_rows(w, FP8), None, x.dtype)
    exact = F.linear(x.double(), w.double())
    assert 0.01 < (y.double() - exact).norm() / exact.norm() < 2**0.5 * 2**-4 / 3**0.5


@pytest.mark.parametrize("rows", [0, 3, 16, 17])
def test_few_rows_are_padded_for_the_product_of_a_gpu(rows):
    """With fake CUDA tensors: arithmetic needs a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w = (torch.empty(n, 64, device="cuda", dtype=torch.int8) for n in (rows, 32))
        sums = int8_sums(x, w)
    assert sums.shape == (rows, 32) and sums.dtype == torch.int32 and sums.is_cuda


def test_scaled_mm_calls_an_operator_that_exists():
    """With fake CUDA tensors: torch's own check of layouts, scales and result; arithmetic needs a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.empty(2, 37, 144, device="cuda", dtype=FP8), torch.empty(432, 144, device="cuda", dtype=FP8)
        scales, bias = torch.empty(2, 37, 1, device="cuda"), torch.empty(432, device="cuda", dtype=torch.bfloat16)
        for b in (bias, None):
            y = scaled_mm(x, scales, w, torch.empty(432, 1, device="cuda"), b, torch.bfloat16)
            assert y.shape == (2, 37, 432) and y.dtype == torch.bfloat16
    nothing, w = torch.empty(2, 0, 144, device="meta", dtype=FP8), torch.empty(432, 144, device="meta", dtype=FP8)
    scales = torch.empty(2, 0, 1, device="meta"), torch.empty(432, 1, device="meta")
    assert scaled_mm(nothing, scales[0], w, scales[1], None, torch.bfloat16).shape == (2, 0, 432)
