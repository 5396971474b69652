"""Layers in NVIDIA's 4-bit floats: the kernel's rows are the reference's, bit for bit; cuBLAS's product is imitated."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, draw, judge, strided

from twinflow_rt import ops
from twinflow_rt.kernels import nvfp4
from twinflow_rt.ops.nvfp4 import dequantize_nvfp4, quantize_nvfp4


def rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Groups of zeros, some below e4m3's range of scales, and values half way between two codes."""
    x = draw(*shape)
    x[..., 8:] *= 1e-5
    x[:, ::3] *= torch.tensor([0.0, 1e-3]).repeat(shape[2] // 2)
    if x.numel():
        x[0, 0, :16] = torch.tensor([6, -5, 3.5, 2.5, -1.75, 1.25, 0.75, 0.25] * 2) * 448  # the largest: scale is 1
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 37, 80), (1, 130, 288)])
def test_rows(shape, dtype):
    x = rows(*shape, dtype=dtype)
    packed, scales, whole = nvfp4.quantized(x.flatten(0, 1))
    wanted = quantize_nvfp4(x)
    assert torch.equal(packed, wanted.packed) and whole == 1
    tiles = nvfp4.arranged(wanted.group_scales)
    assert scales.shape == tiles.shape and torch.equal(scales.view(torch.uint8), tiles.view(torch.uint8))


@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 37, 96), (2, 0, 32)])
def test_linear_nvfp4(shape):
    x, bias = rows(*shape, dtype=torch.bfloat16), draw(40, dtype=torch.bfloat16)
    weight = quantize_nvfp4(draw(40, shape[2]))
    exact = dequantize_nvfp4(*quantize_nvfp4(x)).double() @ dequantize_nvfp4(*weight).double().t() + bias.double()
    args = *weight, bias
    judge(nvfp4.linear_nvfp4(strided(x), *args), ops.linear_nvfp4(x, *args), exact.view(*shape[:2], 40))


def test_refusals():
    weight = quantize_nvfp4(draw(8, 32))
    with pytest.raises(ValueError, match=r"group scales \[N, K/16\].*\(8, 16\), \(8, 2\), \(2, 48\)"):
        nvfp4.linear_nvfp4(draw(2, 48), *weight, None)
    with pytest.raises(ValueError, match="without minimums"):
        nvfp4.linear_nvfp4(draw(2, 32), *weight._replace(group_minimums=weight.group_scales), None)
