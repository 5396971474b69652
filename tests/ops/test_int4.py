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


@pytest.mark.parametrize("group", int4.GROUPS)
@pytest.mark.parametrize("limit", [127, 63])
def test_rounding_is_within_half_a_step(group, limit):
    torch.manual_seed(0)
    weight = torch.randn(48, 256) * torch.logspace(-4, 1, 48)[:, None]
    weight[3] = 0
    held = int4.quantize_int4(weight, group, limit)
    step = weight.unflatten(-1, (-1, group)).abs().amax(-1) / 7
    error = (int4.dense(held) - weight).abs().unflatten(-1, (-1, group)).amax(-1)
    assert (error <= 0.502 * step).all()  # float16 rounds the steps
    assert int4.widen(*held[:3]).abs().max() <= limit


@pytest.mark.parametrize("minimums", [False, True])
def test_products_are_those_of_the_weights_in_float64(minimums):
    torch.manual_seed(1)
    held = int4.quantize_int4(torch.randn(40, 128), 32, limit=110)  # room for a minimum
    if minimums:
        held = held._replace(group_minimums=(7.5 * held.group_scales.float()).half())
    x, bias = torch.randn(2, 5, 128), torch.randn(40)
    exact = x.double() @ int4.dense(held).double().t() + bias
    torch.testing.assert_close(int4.linear_w4a16(x, *held, bias).double(), exact, rtol=0, atol=5e-5)
    values, scales = quantize_rows(x, torch.int8)
    rows = values.double() * scales @ (int4.widen(*held[:3]) * held.scales).double().t() + bias
    torch.testing.assert_close(int4.linear_w4a8(values, scales, *held, bias, x.dtype).double(), rows, rtol=0, atol=5e-5)
    assert ((rows - exact).norm() / exact.norm()) < 0.02
