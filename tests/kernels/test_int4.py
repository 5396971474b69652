"""Products with weights of 4 bits against float64: odd sizes, every group, with and without minimums and bias."""

from __future__ import annotations

import pytest
import torch
from oracle import draw, judge, strided

from twinflow_rt import ops
from twinflow_rt.kernels import int4, launch
from twinflow_rt.ops.int4 import GROUPS, pack_codes, quantize_int4, row_units, widen


def held(n: int, k: int, group: int, minimums: bool):
    """A weight of random codes; each minimum is that of some codes around 5 to 10."""
    weight = quantize_int4(draw(n, k) * torch.logspace(-3, 2, n)[:, None], group)
    if not minimums:
        return weight
    around = 5 + 5 * torch.rand(weight.group_scales.shape, generator=torch.Generator().manual_seed(k))
    return weight._replace(group_minimums=(around * weight.group_scales).half())


@pytest.mark.parametrize("minimums", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows, arch", [(1, 89), (35, 90), (150, 89)])
def test_w4a8(monkeypatch, rows, group, minimums, arch):
    """The weight that is multiplied is `widen`'s, and its sums with rows of int8 are exact: one rounding remains."""
    monkeypatch.setattr(launch, "arch", lambda x: arch)
    weight, bias = held(73, 256, group, minimums), draw(73) if minimums else None
    values, scales = ops.quantize_rows(draw(1, rows, 256), torch.int8)
    one = torch.ones_like(scales), *weight[:3], torch.ones(73, 1), None, torch.float32
    exact = values.double() @ widen(*weight[:3]).double().t()
    assert torch.equal(int4.linear_w4a8(values, *one).double(), exact)
    exact = exact * scales.double() * weight.scales.double().t() + (0 if bias is None else bias.double())
    args = values, scales, *weight, bias, torch.bfloat16
    judge(int4.linear_w4a8(*args), ops.linear_w4a8(*args), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("minimums", [False, True])
@pytest.mark.parametrize("rows, group", [(1, 32), (35, 64), (150, 128)])
def test_w4a16(rows, group, minimums, dtype):
    weight, bias = held(73, 256, group, minimums), draw(73, dtype=dtype) if minimums else None
    x = draw(1, rows, 256, dtype=dtype)
    exact = x.double() @ (row_units(*weight[:3]).double() * weight.scales.double()).t()
    exact = exact if bias is None else exact + bias.double()
    judge(int4.linear_w4a16(strided(x), *weight, bias), ops.linear_w4a16(x, *weight, bias), exact)


def test_every_code_of_any_scale_is_widened_exactly():
    """All 16 codes under scales and minimums of float16 bits of every kind, halves that round to even among them."""
    n = 96
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).expand(n, 64)
    scales = torch.cat([torch.tensor([2.0**-24, 0.5, 1.5, 8.0, 0.0]), draw(n - 5).abs() * 2.0 ** -torch.arange(n - 5)])
    minimums = torch.cat([torch.tensor([0.5, 1.5, -2.5, 60.0, 3.5]), draw(n - 5, seed=1) * 8])
    for given in (None, minimums.half()[:, None]):
        packed, group_scales = pack_codes(codes), scales.half()[:, None]
        got = int4.linear_w4a8(
            torch.eye(64, dtype=torch.int8), torch.ones(64, 1), packed, group_scales, given, torch.ones(n, 1), None,
            torch.float32,
        )  # fmt: skip
        assert torch.equal(got.t(), widen(packed, group_scales, given).float())


def test_no_rows_and_rows_of_any_shape():
    weight = held(16, 64, 64, False)
    assert int4.linear_w4a16(draw(2, 0, 64, dtype=torch.float16), *weight, None).shape == (2, 0, 16)
    x = draw(2, 3, 2, 64, dtype=torch.float16)
    assert torch.equal(
        int4.linear_w4a16(x, *weight, None).flatten(0, 2), int4.linear_w4a16(x.view(-1, 64), *weight, None)
    )


def test_refusals():
    weight = held(16, 128, 64, False)
    x = draw(3, 128, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"multiple of 64.*\(3, 64\)"):
        int4.linear_w4a16(x[:, :64], *weight, None)
    with pytest.raises(ValueError, match="G one of 32, 64, 128"):
        int4.linear_w4a16(x, weight.packed, weight.group_scales.repeat(1, 4), None, weight.scales, None)
    with pytest.raises(ValueError, match=r"group scales are contiguous \[16, 2\], torch.float16"):
        int4.linear_w4a16(x, *weight._replace(group_scales=weight.group_scales.float()), None)
    with pytest.raises(ValueError, match=r"scales are contiguous \[16, 1\]"):
        int4.linear_w4a16(x, *weight._replace(scales=weight.scales[:, 0]), None)
    with pytest.raises(ValueError, match="bias are contiguous"):
        int4.linear_w4a16(x, *weight, draw(15))
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        int4.linear_w4a16(x.float(), *weight, None)
    with pytest.raises(ValueError, match=r"int8 rows .* torch.float16 \[3, 128\]"):
        int4.linear_w4a8(x, draw(3, 1), *weight, None, torch.float16)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_a_warp_has_16_outputs_of_every_row(arch):
    """Triton splits tiles among warps along both axes unless they are tall enough; then weights are widened twice."""
    for rows in (1, 16, 33, 64, 65, 4224, 2**20):
        c = int4.config(rows, arch)
        assert c.outputs == 16 * c.warps and 32 <= c.rows <= 256
        assert c.rows >= min(rows, 128) and (c.rows // 2 < rows or c.rows == 32)
