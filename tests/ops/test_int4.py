"""Weights of 4 bits: packing, the form that 8-bit products multiply, and both products against float64."""

import pytest
import torch

from twinflow_rt.ops import int4
from twinflow_rt.ops.linear import quantize_rows


def test_codes_are_packed_in_pairs_of_32():
    codes = torch.randint(16, (3, 192), dtype=torch.uint8)
    packed = int4.pack_codes(codes)
    assert packed.shape == (3, 96) and packed.dtype == torch.uint8
    assert torch.equal(int4.unpack_codes(packed), codes)
    assert packed[1, 35] == codes[1, 67] + 16 * codes[1, 99]


def least_error(weight, group):
    """The squared error of the best of many steps for each group, either sign, in float64."""
    groups = weight.double().unflatten(-1, (-1, group))
    top = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    tried = []
    for step in (sign * top / n for sign in (1, -1) for n in torch.arange(6.5, 12, 0.05)):
        tried.append((((groups / step).round().clamp(-8, 7) * step - groups) ** 2).sum(-1))
    return torch.stack(tried).amin(0).sum()


@pytest.mark.parametrize("group", int4.GROUPS)
def test_quantizing_is_about_as_near_as_steps_allow(group):
    torch.manual_seed(0)
    weight = torch.randn(48, 256) * torch.logspace(-4, 1, 48)[:, None]
    weight[3], weight[4, :128] = 0, 0
    held = int4.quantize_int4(weight, group)
    assert int4.widen(*held[:3]).abs().max() == 127 and not int4.dense(held)[3].any()
    for rows in (slice(0, 24), slice(24, 48)):
        error = (int4.dense(held)[rows].double() - weight[rows]).square().sum()
        assert error <= 1.08 * least_error(weight[rows], group)  # rounding the largest to 7 or -7: 1.5 times


def test_quantizing_part_by_part_changes_nothing(monkeypatch):
    weight = torch.randn(50, 128)
    whole = int4.quantize_int4(weight.bfloat16(), 64)
    monkeypatch.setattr(int4, "ON_CPU", 7 * 128)
    for got, expected in zip(int4.quantize_int4(weight.bfloat16(), 64), whole, strict=True):
        assert expected is None or torch.equal(got, expected)
    for got, expected in zip(int4.quantize_int4(weight.to("meta"), 64), whole, strict=True):
        assert expected is None or (got.shape, got.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("minimums", [False, True])
def test_products_are_those_of_the_weights_in_float64(minimums):
    torch.manual_seed(1)
    held = int4.quantize_int4(torch.randn(40, 128), 32)
    if minimums:
        held = held._replace(group_minimums=(7.5 * held.group_scales.float()).half())
    x, bias = torch.randn(2, 5, 128), torch.randn(40)
    exact = x.double() @ int4.dense(held).double().t() + bias
    torch.testing.assert_close(int4.linear_w4a16(x, *held, bias).double(), exact, rtol=0, atol=5e-5)
    values, scales = quantize_rows(x, torch.int8)
    rows = values.double() * scales @ (int4.widen(*held[:3]) * held.scales).double().t() + bias
    torch.testing.assert_close(int4.linear_w4a8(values, scales, *held, bias, x.dtype).double(), rows, rtol=0, atol=5e-5)
    assert ((rows - exact).norm() / exact.norm()) < 0.02
