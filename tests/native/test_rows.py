"""Rows that native kernels quantize, against float64 arithmetic and the references; where they run: see test_native."""

from __future__ import annotations

import pytest
import torch

from benches.ops.case import SIZES
from benches.ops.eight_bit_cases import eight_bit_cases
from tests.kernels.oracle import draw
from tests.native.test_native import DTYPES, EPS, ODD, check, formats, native
from twinflow_rt import ops
from twinflow_rt.ops.implementations import QUANTIZED_OPS
from twinflow_rt.ops.native import library, linear, mlp

ROWS = [c.name for c in eight_bit_cases(SIZES["tiny"], torch.float32, "cpu") if c.op in QUANTIZED_OPS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SIZES["tiny"], ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("name", [name for name in ROWS if name != "linear_quantized, float8"])
def test_rows(at, name, sizes, dtype):
    """Quantized rows of norms and activations: one rounding, whatever the storage."""
    (case,) = (c for c in eight_bit_cases(sizes, dtype, "cpu") if c.name == name)
    if at.place == "cuda" and case.op == "linear_quantized" and sizes.width % 8:
        pytest.skip("torch's int8 product of a GPU takes multiples of 8")
    if at.place == "cpu" and "float8" in name:
        with pytest.raises(TypeError, match="int8"):
            native(case.op)(*case.inputs())
        return
    got = native(case.op)(*at(case.inputs()))
    got = tuple(x.cpu() for x in got) if isinstance(got, tuple) else got.cpu()
    check(case.read(got), case.read(getattr(ops, case.op)(*case.inputs())), *case.exact(*case.inputs()))


@pytest.mark.parametrize("width", [1, 37, 760, 10240])
def test_values_of_rows_are_the_references(at, width):
    """x itself needs no arithmetic before it is quantized: values and scales are equal to the last bit."""
    wide = draw(3, 5, width + 3)
    for x in (wide[..., :width], wide[:, ::2, 3:], torch.zeros(2, width), 1e30 * wide, 1e-13 * wide, wide[:0]):
        for to in formats(at):
            x = x if width < 2048 or at.place == "cpu" else x[..., :width].contiguous()  # aligned, as wide rows must be
            got, eager = linear.quantize_rows(at(x), to), ops.quantize_rows(x, to)
            assert torch.equal(got[0].cpu().float(), eager[0].float()) and torch.equal(got[1].cpu(), eager[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, hidden", [(2048, 18944), (5120, 20480), (16384, 12288)])
def test_wide_rows(at, width, hidden, dtype):
    """As wide as a GPU's kernels take them: what the MLP of the widest text encoder has, and the limits."""
    x, w = draw(2, 1, width, dtype=dtype), 1 + 0.3 * draw(width, seed=1)
    wide = draw(2, 2 * hidden, dtype=dtype)
    for to in formats(at):
        for op, args in (
            ("quantize_rows", (x, to)), ("residual_norm_quantized", (x, x.flip(0), w, w, EPS, to)),
            ("residual_layer_norm_quantized", (x, x.flip(0), w, None, w, EPS, to)), ("swiglu_quantized", (wide, to)),
            ("gelu_tanh_quantized", (wide[:, :hidden].contiguous(), to)),
        ):  # fmt: skip
            *_, values, scales = native(op)(*at(args))
            *_, wanted, reference = getattr(ops, op)(*args)
            torch.testing.assert_close(scales.cpu(), reference, rtol=1e-4, atol=0)
            step = 1 if to == torch.int8 else 2**-3 * wanted.float().abs().clamp_min(2**-6)
            assert ((values.cpu().float() - wanted.float()).abs() <= step).all()


def test_emulated_rows_too_wide_are_refused(emulated, monkeypatch):
    monkeypatch.setattr(library, "load", lambda device: emulated)
    for call in (
        lambda: linear.quantize_rows(draw(1, 16392), torch.int8),
        lambda: mlp.swiglu_quantized(draw(1, 2 * 20488), torch.int8),
        lambda: linear.quantize_rows(draw(1, 2049), torch.int8),
    ):
        with pytest.raises(RuntimeError, match="too wide"):
            call()


def test_rows_that_hold_no_number_say_so(at):
    x = draw(3, 40)
    x[0, 17], x[1, 3] = torch.nan, -torch.inf
    values, scales = linear.quantize_rows(at(x), torch.int8)
    assert scales[0].isnan() and scales[1].isinf() and scales[2].isfinite()
    sums = linear.dequantize(values.int(), scales, at(torch.ones(40, 1)), None, torch.float32)
    assert not sums[:2].isfinite().any() and sums[2].isfinite().all()
    if at.place != "cpu":
        values, scales = linear.quantize_rows(at(x), torch.float8_e4m3fn)
        assert values[0].float().isnan().all() and scales[1].isinf() and values[2].float().isfinite().all()
    with pytest.raises(TypeError, match="float8_e5m2"):
        linear.quantize_rows(at(x), torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (17, 64), (0, 8)])
def test_dequantize(at, shape, dtype):
    rows, columns = shape
    sums = torch.randint(-(2**20), 2**20, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(columns))
    x_scales, w_scales, bias = draw(rows, 1).abs(), draw(columns, 1, seed=1).abs(), draw(columns, dtype=dtype)
    for b in (bias, None):
        got = linear.dequantize(*at((sums, x_scales, w_scales, b)), dtype)
        exact = sums.double() * x_scales.double() * w_scales.double().t() + (0 if b is None else b.double())
        assert got.dtype == dtype and got.shape == shape
        if rows:
            error = (got.cpu().double() - exact).abs().max()
            assert error <= torch.finfo(dtype).eps * exact.abs().max()
