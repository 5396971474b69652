"""Rows in NVIDIA's 4-bit floats: the kernel's bits are the reference's, whose products are judged against float64."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, draw, strided

from twinflow_rt.kernels import launch, nvfp4
from twinflow_rt.ops.nvfp4 import quantize_nvfp4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 37, 80), (1, 130, 288), (2, 0, 32)])
def test_quantize_nvfp4(shape, dtype):
    """Among the blocks some of zeros, some below e4m3's range of scales, and values half way between two codes."""
    x = draw(*shape)
    x[..., 8:] *= 1e-5
    x[:, ::3] *= torch.tensor([0.0, 1e-3]).repeat(shape[2] // 2)
    if x.numel():
        x[0, 0, :16] = torch.tensor([6, -5, 3.5, 2.5, -1.75, 1.25, 0.75, 0.25] * 2) * 448  # the largest: scale is 1
    x = x.to(dtype)
    for got, wanted in zip(nvfp4.quantize_nvfp4(strided(x)), quantize_nvfp4(x), strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="multiple of 16 elements, got 24"):
        nvfp4.quantize_nvfp4(draw(2, 24))
    monkeypatch.setattr(launch, "arch", lambda x: 86)
    with pytest.raises(ValueError, match=r"8\.9"):
        nvfp4.quantize_nvfp4(draw(2, 16))
