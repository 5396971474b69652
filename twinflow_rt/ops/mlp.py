"""Gated activations of the feed-forward blocks."""

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
