"""NVIDIA's 4-bit floats: codes, the order of group scales, products against float64, what cuBLAS is called with."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from twinflow_rt.kernels import nvfp4 as kernels
from twinflow_rt.ops import nvfp4


def test_codes_are_the_nearest_floats_ties_to_even():
    grid = torch.tensor(nvfp4.VALUES)
    values = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, torch.rand(16) * 6, grid[-1:]])  # two groups
    packed, _, _, scales = nvfp4.quantize_nvfp4(torch.stack((values, -values)) * 448)
    assert scales.tolist() == [[1], [1]] and packed.shape == (2, 16)
    even = torch.cat([grid, torch.tensor([0, 1, 1, 2, 2, 4, 4])])  # as IEEE rounds: the code whose last bit is 0
    got = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
    assert torch.equal(grid[got[0, :15]], even) and torch.equal(got[1, 1:8], got[0, 1:8] + 8)
    assert ((grid[got[0, 15:]] - values[15:]).abs() <= (grid[:, None] - values[15:]).abs().amin(0) + 1e-6).all()


def test_group_scales_lie_in_tiles_of_128_by_4():
    plain = torch.arange(130 * 6).remainder(120).view(130, 6).to(torch.uint8).view(torch.float8_e4m3fn)
    tiles = kernels.arranged(plain).view(torch.uint8).flatten()
    assert tiles.numel() == 256 * 8
    for r, c in ((0, 0), (1, 0), (31, 3), (32, 0), (33, 5), (127, 2), (128, 0), (129, 5)):
        tile = (r // 128) * 2 + c // 4
        assert tiles[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] == plain.view(torch.uint8)[r, c]
    assert not tiles.view(2, 2, 32, 4, 4)[1, :, 2:].any()  # what fills the last tiles


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_products_are_those_of_the_tensors_in_float64(size):
    torch.manual_seed(0)
    x, w, bias = size * torch.randn(2, 70, 96), torch.randn(48, 96), torch.randn(48)
    w *= torch.logspace(-3, 0, 48)[:, None]
    x[..., :16] *= 1e-3
    rows, weight = nvfp4.quantize_nvfp4(x), nvfp4.quantize_nvfp4(w)
    for held, true in ((rows, x.flatten(0, 1)), (weight, w)):
        groups = (nvfp4.dequantize_nvfp4(*held) - true).unflatten(1, (-1, 16)), true.unflatten(1, (-1, 16))
        error, top = (v.abs().amax(-1) for v in groups)
        assert (error <= top / 5 + 3 * 2.0**-9 * held.scales).all()  # half of the widest step, the scale's own rounding
    exact = nvfp4.dequantize_nvfp4(*rows).double() @ nvfp4.dequantize_nvfp4(*weight).double().t() + bias
    got = nvfp4.linear_nvfp4(x, *weight, bias)
    torch.testing.assert_close(got.double().flatten(0, 1), exact, rtol=1e-5, atol=1e-5 * size)


def test_cublas_takes_them_as_they_are():
    """By torch's own check of operands, scales and their order, which needs no GPU."""
    made = lambda rows: (
        torch.empty(rows, 96, dtype=torch.uint8), torch.empty(256, 12, dtype=torch.float8_e4m3fn), torch.empty(1)
    )  # fmt: skip
    with FakeTensorMode(), torch.device("cuda"):
        y = kernels.product(made(200), made(160), torch.empty(160, dtype=torch.bfloat16), torch.bfloat16)
        assert y.shape == (200, 160) and y.dtype == torch.bfloat16
        with pytest.raises((RuntimeError, ValueError), match="scale"):
            kernels.product(made(200), made(304), None, torch.bfloat16)  # 304 rows have 384 of scales
