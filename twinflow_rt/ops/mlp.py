"""Activations of the feed-forward blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import quantize_rows


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b for x = a | b on the last axis (SwiGLU, arXiv 2002.05202).

    x: [..., 2*hidden], the output of the merged w1|w3 projection. Returns [..., hidden] in x's dtype.
    float32 inside, one rounding.
    """
    a, b = x.chunk(2, -1)
    return (F.silu(a.float()) * b.float()).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))   (GELU's tanh form, arXiv 1606.08415).

    x: any shape, any float dtype; returns the same. float32 inside, one rounding.
    """
    return F.gelu(x.float(), approximate="tanh").to(x.dtype)


def swiglu_quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`swiglu`, then `quantize_rows` to `dtype` with no rounding between: (values [..., hidden], scales [..., 1])."""
    return quantize_rows(swiglu(x.float()), dtype)


def gelu_tanh_quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`gelu_tanh`, then `quantize_rows` to `dtype` with no rounding between: (values [..., D], scales [..., 1])."""
    return quantize_rows(gelu_tanh(x.float()), dtype)


def linear_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """`swiglu` of the merged w1|w3 projection: silu(x w1^T) * (x w3^T).

    x: [..., K]; weight: [2*hidden, K], w1 above w3, in x's dtype. Returns [..., hidden] in x's dtype.
    Both products stay float32 until the one rounding at the end.
    """
    return swiglu(x.float() @ weight.float().t()).to(x.dtype)
