"""Around the VAE: bytes as the eager reference's own, the rest against float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, draw, judge

from twinflow_rt import ops
from twinflow_rt.kernels import decode, launch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 37, 19), (1, 1, 5, 199), (2, 4, 3, 3), (0, 3, 8, 8)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_to_uint8(shape, dtype, channels_last):
    image = draw(*shape, dtype=dtype)
    source = image.contiguous(memory_format=torch.channels_last) if channels_last else image
    got = decode.to_uint8(source)
    assert got.dtype == torch.uint8 and got.is_contiguous() and torch.equal(got, ops.to_uint8(image))


def test_rounds_halves_to_even_as_numpy_does():
    levels = np.arange(255, dtype=np.float32) + np.float32(0.5)
    image = torch.from_numpy(levels / np.float32(255) * 2 - 1).view(1, 1, 15, 17)
    scaled = np.clip(image.numpy() * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    assert (scaled % 1 == 0.5).sum() > 20  # enough of them stay on the half
    assert np.array_equal(decode.to_uint8(image).numpy(), np.rint(scaled).astype(np.uint8).transpose(0, 2, 3, 1))


def test_a_crop_of_a_larger_image():
    image = draw(2, 3, 20, 30)
    crop = image[:, :, 3:17:2, 5:22]
    assert torch.equal(decode.to_uint8(crop), ops.to_uint8(crop))


def test_refuses_what_is_no_image():
    with pytest.raises(ValueError, match="B, C, H, W"):
        decode.to_uint8(draw(3, 8, 8))


@pytest.mark.parametrize("order", ["channels first", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, patch", [((2, 4, 6, 10), 2), ((1, 3, 5, 7), 1), ((1, 16, 4, 6), 2), ((0, 4, 2, 2), 2)])
def test_x0_to_vae(shape, patch, dtype, order):
    b, c, h, w = shape
    x, std, mean = draw(*shape), draw(c, seed=1), draw(c, seed=2)
    if order == "channels first":  # inside a token
        tokens = draw(b, h // patch, w // patch, c, patch, patch, dtype=dtype)
        velocity = tokens.permute(0, 3, 1, 4, 2, 5)
    else:
        tokens = draw(b, h // patch, w // patch, patch, patch, c, dtype=dtype)
        velocity = tokens.permute(0, 5, 1, 3, 2, 4)
    x = x.contiguous(memory_format=torch.channels_last)
    flat = velocity.double().reshape(shape)
    exact = (x.double() - 0.75 * flat) * std.view(-1, 1, 1).double() + mean.view(-1, 1, 1).double()
    got = decode.x0_to_vae(x, velocity, 0.75, std, mean, dtype)
    assert got.is_contiguous(memory_format=torch.channels_last)
    judge(got, ops.x0_to_vae(x, velocity, 0.75, std, mean, dtype), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 8, 37, 2)])
def test_folded_upsampling(shape, dtype):
    x, weight, bias = draw(*shape, dtype=dtype), draw(6, shape[1], 3, 3, dtype=dtype), draw(6, dtype=dtype)
    large = F.interpolate(x, scale_factor=2.0, mode="nearest")
    exact = F.conv2d(large.double(), weight.double(), bias.double(), padding=1)
    twice = ops.upsample_conv(x.double(), ops.fold_upsample(weight.double()), bias.double())
    torch.testing.assert_close(twice, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.upsample_conv(x.double(), weight.double(), bias.double()), exact)
    # sums of the kernel's taps are rounded to its dtype once, which the plain convolution does not do
    folded = ops.upsample_conv(x.float(), ops.fold_upsample(weight), bias) if dtype == torch.float32 else None
    if folded is not None:
        judge(folded, F.conv2d(large, weight, bias, padding=1), exact)
    else:
        rounded = ops.fold_upsample(weight)
        assert rounded.dtype == dtype and torch.equal(rounded, ops.fold_upsample(weight.float()).to(dtype))


def test_refusals():
    x, w = draw(1, 6, 4, 4), draw(6)
    with pytest.raises(ValueError, match="H/p, p"):
        decode.x0_to_vae(x, draw(1, 6, 2, 2, 2, 1), 1.0, w, w, torch.float32)
    with pytest.raises(ValueError, match="float32"):
        decode.x0_to_vae(x, draw(1, 6, 2, 2, 2, 2), 1.0, w.bfloat16(), w, torch.float32)


def test_config():
    assert decode.config(1) == launch.Tile(32, 1) and decode.config(3 * 1024 * 1024) == launch.Tile(1024, 8)
