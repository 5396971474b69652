"""Cases of `op_cases` for whole layers: linear ones with what follows them, and those of the VAE's decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benches.ops.case import EPS, Case, Draw, Drawing, Sizes, exact_gelu, exact_rms, exact_swiglu
from twinflow_rt.ops import fold_upsample

# the ops of these cases
LAYERS = (
    "linear_swiglu", "linear_gelu", "linear_residual", "x0_to_vae", "group_norm_silu", "rms_norm_silu", "upsample_conv",
)  # fmt: skip


def products(s: Sizes, draw: Draw, b: int) -> list[Case]:
    """Return the cases of feed-forward blocks: up and gate, up, and down into the residual stream."""
    count, one = b * s.tokens, b * s.tokens * s.width * s.hidden
    x: Drawing = lambda: draw(b, s.tokens, s.width)

    def weight(rows: int, columns: int) -> Tensor:
        return draw(rows, columns, seed=9).mul(columns**-0.5)

    def swiglu(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (exact_swiglu(x.double() @ weight.double().t()),)

    def gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (exact_gelu(x.double() @ weight.double().t() + bias.double()),)

    def residual(old: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (old.double() + x.double() @ weight.double().t(),)

    moved = (s.width * s.hidden + count * (s.width + s.hidden)) * draw.item
    return [
        Case("linear_swiglu", "linear_swiglu", lambda: (x(), weight(2 * s.hidden, s.width)), swiglu,
             moved + s.width * s.hidden * draw.item, 4 * one),
        Case("linear_gelu", "linear_gelu", lambda: (x(), weight(s.hidden, s.width), draw(s.hidden)), gelu, moved,
             2 * one),
        Case("linear_residual", "linear_residual",
             lambda: (x(), draw(b, s.tokens, s.hidden, seed=1), weight(s.width, s.hidden)), residual,
             moved + count * s.width * draw.item, 2 * one),
    ]  # fmt: skip


def decoding(s: Sizes, draw: Draw, b: int) -> list[Case]:
    """Return the cases of the VAE: its input, and layers of the level with the image's size."""
    channels, groups = (128, 32) if s.pixels > 64 else (16, 4)
    edge, half, latents = s.pixels, s.pixels // 2, b * math.prod(s.latents)

    def image(edge: int) -> Tensor:
        return draw(b, edge, edge, channels).permute(0, 3, 1, 2)

    def latent() -> tuple[Any, ...]:
        c, h, w = s.latents
        tokens, std = draw(b, h // 2, w // 2, 2, 2, c), draw.weight(c)
        return draw(b, c, h, w), tokens.permute(0, 5, 1, 3, 2, 4), 1.0, std, std - 1, draw.dtype

    def unpacked(x: Tensor, velocity: Tensor, t: float, std: Tensor, mean: Tensor, _: Any) -> tuple[Tensor]:
        x0 = x.double() - t * velocity.double().reshape(x.shape)
        return (x0 * std.double().view(-1, 1, 1) + mean.double().view(-1, 1, 1),)

    def group(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor]:
        return (F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double(), eps)),)

    def rms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor]:
        return (F.silu(exact_rms(x.permute(0, 2, 3, 1), weight, eps)).permute(0, 3, 1, 2),)

    def kernel() -> Tensor:
        return draw(channels, channels, 3, 3).mul((9 * channels) ** -0.5)

    def enlarged(x: Tensor, _: Tensor, bias: Tensor) -> tuple[Tensor]:
        large = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
        return (F.conv2d(large, kernel().double(), bias.double(), padding=1),)

    whole, small = b * channels * edge**2, b * channels * half**2
    weights: Callable[[], tuple[Tensor, ...]] = lambda: (  # of the decoder's dtype, as it has them
        draw.weight(channels).to(draw.dtype), (draw.weight(channels, seed=1) - 1).to(draw.dtype)
    )  # fmt: skip
    return [
        Case("x0_to_vae", "x0_to_vae", latent, unpacked, 3 * latents * draw.item),
        Case("group_norm_silu", "group_norm_silu", lambda: (image(edge), groups, *weights(), EPS), group,
             3 * whole * draw.item),  # read twice: for its statistics, and to be scaled by them
        Case("rms_norm_silu", "rms_norm_silu", lambda: (image(edge), draw.weight(channels), EPS), rms,
             2 * whole * draw.item),
        Case("upsample_conv", "upsample_conv", lambda: (image(half), fold_upsample(kernel()), draw(channels)), enlarged,
             5 * small * draw.item, 2 * 16 * small * channels),
    ]  # fmt: skip
