"""Normalisation: the eager references are the specification of every faster implementation.

All of them compute in float32 whatever the storage dtype and round once, at the output. `weight`
is the *effective* norm weight: a learned vector, or that vector times a modulation's (1 + scale) or
tanh(gate), so one op serves plain, modulated and folded networks. The `_quantized` forms hand
`linear.quantize_rows` the normalised rows before they are rounded to storage: one rounding, not two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .declaration import COMPILED, Op, op
from .linear import Quantizing, quantize_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight   (RMSNorm, arXiv 1910.07467).

    x: [B, S, D] in any float dtype. weight: float32, [D] or [B or 1, 1, D]. Returns x's dtype.
    """
    v = x.float()
    return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None = None) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias   (arXiv 1607.06450).

    Nothing here is learned: `weight` is a modulation's 1 + scale, `bias` its shift; None is the
    identity (a network that holds them inside its linear layers). Shapes and dtypes as `rms_norm`.
    """
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def residual_norm(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Closes one sandwich-norm branch and opens the next, in one pass over the data:

        x' = x + rms_norm(branch, post)        h = rms_norm(x', pre)

    x, branch: [B, S, D]; post, pre: float32 weights as in `rms_norm` (`post` carries the gate).
    Returns (x', h) in x's dtype; h is None when `pre` is None. Rounding points: x' once, and h once
    from the rounded x' (what the next block will read).
    """
    b = branch.float()
    b = b * torch.rsqrt(b.square().mean(-1, keepdim=True) + eps) * post
    x = (x.float() + b).to(x.dtype)
    return x, None if pre is None else rms_norm(x, pre, eps)


def residual_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Closes one gated branch and opens the next, in one pass over the data:

        x' = x + gate * branch        h = layer_norm(x', weight, bias)

    x, branch: [B, S, D]; gate, weight, bias: float32 [B or 1, 1, D], None being the identity.
    Returns (x', h) in x's dtype. Rounding points: x' once, and h once from the rounded x'.
    """
    b = branch.float()
    x = (x.float() + (b if gate is None else b * gate)).to(x.dtype)
    return x, layer_norm(x, weight, eps, bias)


def rms_norm_quantized(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`rms_norm`, then `quantize_rows` to `dtype`: (values [B, S, D], float32 scales [B, S, 1])."""
    return quantize_rows(rms_norm(x.float(), weight, eps), dtype)


def layer_norm_quantized(
    x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`layer_norm`, then `quantize_rows` to `dtype`: (values [B, S, D], float32 scales [B, S, 1])."""
    return quantize_rows(layer_norm(x.float(), weight, eps, bias), dtype)


def residual_norm_quantized(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`residual_norm` with h quantized: (x' in x's dtype, values [B, S, D], float32 scales [B, S, 1])."""
    x, _ = residual_norm(x, branch, post, None, eps)
    return x, *rms_norm_quantized(x, pre, eps, dtype)


def residual_layer_norm_quantized(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`residual_layer_norm` with h quantized: (x' in x's dtype, values [B, S, D], float32 scales [B, S, 1])."""
    x, _ = residual_layer_norm(x, branch, gate, weight, bias, eps)
    return x, *layer_norm_quantized(x, weight, eps, bias, dtype)


# -- of images: over the channels of [B, C, H, W], followed by SiLU ----------------------------------------------


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


@dataclass(frozen=True)
class NormOps:
    """Norms as a network calls them."""

    rms_norm: Op = op(rms_norm, *COMPILED)
    layer_norm: Op = op(layer_norm, *COMPILED)
    residual_norm: Op = op(residual_norm, *COMPILED)
    residual_layer_norm: Op = op(residual_layer_norm, *COMPILED)
    group_norm_silu: Op = op(group_norm_silu, "triton", "native")
    rms_norm_silu: Op = op(rms_norm_silu, "triton", "native")


@dataclass(frozen=True)
class QuantizedNormOps:
    """Norms that feed quantized layers."""

    rms_norm_quantized: Quantizing = op(rms_norm_quantized, *COMPILED)
    layer_norm_quantized: Quantizing = op(layer_norm_quantized, *COMPILED)
    residual_norm_quantized: Op = op(residual_norm_quantized, *COMPILED)
    residual_layer_norm_quantized: Op = op(residual_layer_norm_quantized, *COMPILED)
