"""Activations of the feed-forward blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
