"""Products with weights of 8 and of 4 bits on a CPU: by its library or by the kernel of csrc, which both are exact."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.oracle import draw
from twinflow_rt import ops
from twinflow_rt.ops.int4 import Int4Weight, dense, quantize_int4, widen
from twinflow_rt.ops.linear import sums_int8
from twinflow_rt.ops.native import int4, linear

SHAPES = [(1, 1, 64), (5, 50, 192), (259, 97, 1088)]  # rows, outputs, inputs: beyond a block of each at the last


@pytest.fixture(params=["library", "kernel"])
def by(request, monkeypatch):
    if request.param == "library" and not sums_int8():
        pytest.skip("this CPU's library saturates")
    for module in (linear, int4):
        monkeypatch.setattr(module, "sums_int8", lambda: request.param == "library")
    return request.param


def held(n, k, group, minimums):
    weight = quantize_int4(draw(n, k) * k**-0.5, group)
    return weight._replace(group_minimums=(7.5 * weight.group_scales.float()).half()) if minimums else weight


def close(got, exact, dtype):
    assert got.dtype == dtype and got.shape == exact.shape
    limit = (torch.finfo(dtype).eps + 1e-7) * exact.abs().max()  # float32 scaling, one rounding
    assert (got.double() - exact).abs().max() <= 2 * limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group, minimums", [(32, True), (64, False)])
def test_rows_of_int8(by, group, minimums, shape, dtype, monkeypatch):
    m, n, k = shape
    monkeypatch.setattr(int4, "BLOCK", 64 * k)  # of which there are several
    weight, bias = held(n, k, group, minimums), draw(n, dtype=dtype)
    x, scales = ops.quantize_rows(draw(1, m, k), torch.int8)
    wide = widen(*weight[:3])
    for b in (bias, None):
        exact = (x.double() @ wide.double().t()) * scales * weight.scales.double().t()
        exact = exact if b is None else exact + b.double()
        four = int4.linear_w4a8(x, scales, *weight, b, dtype)
        close(four, exact, dtype)
        assert torch.equal(four, linear.linear_quantized(x, scales, wide, weight.scales, b, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group, minimums", [(32, False), (128, True)])
def test_plain_rows(group, minimums, dtype, monkeypatch):
    monkeypatch.setattr(int4, "BLOCK", 4 * 256 * 16)
    weight, x, bias = held(50, 256, group, minimums), draw(2, 9, 256, dtype=dtype), draw(50)
    exact = x.double() @ dense(weight).double().t() + bias.double()
    close(int4.linear_w4a16(x, *weight, bias), exact, dtype)
    assert int4.linear_w4a16(x[:, :0], *weight, None).shape == (2, 0, 50)


def test_extremes_and_strides(by):
    """Codes 0 and 15, the largest row units, weights and rows that are views."""
    scales = torch.full((6, 2), 127 / 8).half()
    weight = Int4Weight(torch.tensor([0x0F, 0xF0]).byte().repeat(6, 64)[:, :64], scales, None, torch.ones(6, 1))
    x = torch.full((4, 256), -127, dtype=torch.int8)[:, ::2]
    got = int4.linear_w4a8(x, torch.ones(4, 1), *(None if t is None else t[::2] for t in weight), None, torch.float32)
    assert torch.equal(got, (x.double() @ widen(*weight[:3])[::2].double().t()).float())


def test_int8_of_any_size(by):
    for m, n, k in ((1, 1, 1), (3, 5, 37), (5, 49, 1030)):
        x, w = (torch.randint(-60, 61, size, dtype=torch.int8) for size in ((m, k), (n, k)))
        got = linear.linear_quantized(x, torch.ones(m, 1), w, torch.ones(n, 1), None, torch.float32)
        assert torch.equal(got.double(), x.double() @ w.double().t())


def test_every_thread_count_gives_the_same_bits():
    weight, (x, scales) = held(97, 1088, 64, False), ops.quantize_rows(draw(300, 1088), torch.int8)
    before, results = torch.get_num_threads(), []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(int4.linear_w4a8(x, scales, *weight, None, torch.float32))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_wrong_weights_are_refused(monkeypatch):
    monkeypatch.setattr(int4, "sums_int8", lambda: False)
    good, x, one = held(4, 64, 32, True), torch.ones(2, 64, dtype=torch.int8), torch.ones(2, 1)
    for bad in (
        good._replace(packed=good.packed[:, :-1]), good._replace(group_scales=good.group_scales.float()),
        good._replace(group_minimums=good.group_minimums[:3]), good._replace(scales=good.scales.view(-1)),
        good._replace(group_scales=good.group_scales[:, :1], group_minimums=None, packed=good.packed.char()),
        good._replace(group_scales=good.group_scales[:, :1].repeat(1, 3), group_minimums=None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"4 bits|out of range"):
            int4.linear_w4a8(x, one, *bad, None, torch.float32)
        with pytest.raises(ValueError, match=r"4 bits|out of range"):
            int4.linear_w4a16(x.float(), *bad, None)
    for rows, scales, bias in ((x.int(), one, None), (x, one[:1], None), (x, one, torch.ones(3))):
        with pytest.raises(ValueError, match="rows of int8"):
            int4.linear_w4a8(rows, scales, *good, bias, torch.float32)
