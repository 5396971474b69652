"""Bidirectional attention: softmax over a padded joint sequence, and linear in its length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v per head.

    q: [B, Sq, H, D]; k, v: [B, S, H, D]; lengths: int64 [B], the keys of sample b that count are the
    first lengths[b] (None: all). Returns [B, Sq, H*D] in q's dtype. No mask means no mask: an
    all-true one costs up to 40 % on a GPU.
    """
    mask = None
    if lengths is not None:
        mask = (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """relu(q) (relu(k)^T v) / (relu(q) relu(k)^T 1) per head   (SANA, arXiv 2410.10629).

    q, k, v: [B, S, H, D]. Returns [B, S, H*D] in q's dtype. relu(k)^T v is one D x D matrix per head,
    so the cost grows with S, not its square. float32 inside, one rounding; a query without any
    positive product gives 0 (its divisor is 1e-15).
    """
    dtype = q.dtype
    q, k, v = (x.float().transpose(1, 2) for x in (q.relu(), k.relu(), v))
    total = q @ k.sum(2).unsqueeze(-1)
    return (q @ (k.transpose(2, 3) @ v) / (total + 1e-15)).transpose(1, 2).flatten(2).to(dtype)
