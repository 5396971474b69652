"""From the sampler's last velocity through the VAE to pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .declaration import COMPILED, Op, op


def to_uint8(image: Tensor) -> Tensor:
    """round(clamp(image / 2 + 1/2, 0, 1) * 255), channels last.

    image: [B, 3, H, W], any float dtype, nominally in [-1, 1]. Returns uint8 [B, H, W, 3].
    float32 inside; rounds half to even, as numpy (and so diffusers) does.
    """
    scaled = (image.float() * 0.5 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def x0_to_vae(x: Tensor, velocity: Tensor, t: float, std: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """(x_t - t * F) * std + mean per channel: the VAE's input straight from the network's output tokens.

    x: [B, C, H, W]; velocity: [B, C, H/p, p, W/p, p], the view of the tokens in which patches of p x p
    are two axes (no copy whatever the order inside a token; t = -1 for a network that puts out -F);
    std, mean: float32 [C]. Returns [B, C, H, W] in `dtype`, channels last. float32 inside, one rounding.
    """
    x0 = x.float() - t * velocity.flatten(4, 5).flatten(2, 3).float()
    y = x0 * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    return y.to(dtype).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class DecodeOps:
    """What lies around the VAE."""

    to_uint8: Op = op(to_uint8, *COMPILED)
    x0_to_vae: Op = op(x0_to_vae, "triton")
