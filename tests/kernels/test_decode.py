"""Pixels: the bytes are the eager reference's own, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import draw
from twinflow_rt.kernels import decode

from twinflow_rt import ops
from twinflow_rt.errors import ConfigError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
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
    with pytest.raises(ConfigError, match="B, C, H, W"):
        decode.to_uint8(draw(3, 8, 8))


def test_config():
    assert decode.config(1) == decode.Config(32, 1) and decode.config(3 * 1024 * 1024) == decode.Config(1024, 8)
