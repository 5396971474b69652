"""The ops of ops/decode.py by the kernels of csrc."""

from __future__ import annotations

import torch
from torch import Tensor

from .register import op, run


def _bytes(image: Tensor) -> Tensor:
    batch, channels, height, width = image.shape
    return image.new_empty((batch, height, width, channels), dtype=torch.uint8)


@op("to_uint8(Tensor image) -> Tensor", _bytes)
def to_uint8(image: Tensor) -> Tensor:
    out = _bytes(image)
    run("to_uint8", image, image.data_ptr(), image.stride(), out.data_ptr(), image.shape)
    return out
