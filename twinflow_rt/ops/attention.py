"""Bidirectional attention over a padded joint sequence."""

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
