"""From the VAE's output to pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(image: Tensor) -> Tensor:
    """round(clamp(image / 2 + 1/2, 0, 1) * 255), channels last.

    image: [B, 3, H, W], any float dtype, nominally in [-1, 1]. Returns uint8 [B, H, W, 3].
    float32 inside; rounds half to even, as numpy (and so diffusers) does.
    """
    scaled = (image.float() * 0.5 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
