"""From the sampler's last velocity through the VAE to pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import rms_norm

# row u of a stride-2 transposed convolution's kernel is the sum of these rows of the 3-tap kernel that
# read the same pixel of the smaller image: output 2y meets rows 3 and 1 (pixels y-1, y), 2y+1 rows 2 and 0
_FOLD = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


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


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(group_norm(x) * weight + bias)   (GroupNorm, arXiv 1803.08494).

    x: [B, C, H, W] in any float dtype; weight, bias: [C]; C a multiple of `groups`. Returns x's dtype,
    channels last. Statistics and arithmetic are float32, with one rounding.
    """
    y = F.silu(F.group_norm(x.float(), groups, weight.float(), bias.float(), eps), inplace=True)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def rms_norm_silu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """silu(rms_norm over the channels of x, times weight), see `ops.rms_norm`.

    x: [B, C, H, W] in any float dtype; weight: float32 [C]. Returns x's dtype, channels last.
    Statistics and arithmetic are float32, with one rounding.
    """
    y = F.silu(rms_norm(x.permute(0, 2, 3, 1).float(), weight, eps), inplace=True)
    return y.to(x.dtype).contiguous().permute(0, 3, 1, 2)


def fold_upsample(weight: Tensor) -> Tensor:
    """Kernel of `upsample_conv` from that of a 3x3 convolution which follows a nearest upsampling by 2.

    An output pixel's nine taps read only 2x2 pixels of the smaller image, which four depending on its
    parity: four 2x2 convolutions, interleaved, are one transposed convolution of stride 2. weight:
    [O, I, 3, 3]; returns [I, O, 4, 4] in its dtype. Sums in float32 (float64 for float64), one rounding.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    fold = torch.tensor(_FOLD, dtype=wide, device=weight.device)
    return torch.einsum("ui,vj,ocij->couv", fold, fold, weight.to(wide)).to(weight.dtype).contiguous()


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv3x3(nearest upsampling of x by 2), by either form of its kernel.

    x: [B, I, H, W]; bias: [O] or None. weight: [O, I, 3, 3], as a checkpoint has it, or [I, O, 4, 4] from
    `fold_upsample`: then it takes 4 instead of 9 multiplications per output pixel and channel pair, and
    the enlarged input is never made. Returns [B, O, 2H, 2W]. Rounding as that of torch's convolutions.
    """
    if weight.shape[-1] == 4:
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
