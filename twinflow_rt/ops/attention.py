"""Bidirectional attention: softmax over a padded joint sequence, and linear in its length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .declaration import Op, op
from .linear import SMALLEST, quantize_rows


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v per head.

    q: [B, Sq, H, D]; k, v: [B, S, H, D]; lengths: int64 [B], the keys of sample b that count are the first lengths[b]
    (None: all). Returns [B, Sq, H*D] in q's dtype. No mask means no mask: an all-true one costs up to 40 % on a GPU.
    """
    mask = None
    if lengths is not None:
        mask = (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def attention_fp8(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """`attention` with scores of float8 operands: softmax((Q K^T) * s_q * s_k^T / sqrt(D)) v per head, where
    (Q, s_q) and (K, s_k) are `quantize_rows` of q and k to float8_e4m3fn, a scale per token and head.

    Shapes as `attention`; returns q's dtype; a sample without keys gives zeros. v is not quantized. float32 inside;
    exp(score - largest) is rounded to q's dtype before it meets v (their sum is not), and the result once.
    """
    values, scales = zip(*(quantize_rows(x, torch.float8_e4m3fn) for x in (q, k)), strict=True)
    q32, k32 = (x.float() * s for x, s in zip(values, scales, strict=True))
    scores = torch.einsum("bqhd,bkhd->bhqk", q32, k32) / math.sqrt(q.shape[-1])
    if lengths is not None:
        live = (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[:, None, None, :]
        scores = scores.masked_fill(~live, -math.inf)
    top = scores.amax(-1, keepdim=True) if k.shape[1] else scores.new_zeros(())
    p = (scores - top.nan_to_num(neginf=0.0)).exp()
    y = torch.einsum("bhqk,bkhd->bqhd", p.to(q.dtype).float(), v.float())
    return (y / p.sum(-1).transpose(1, 2).unsqueeze(-1).clamp_min(SMALLEST)).flatten(2).to(q.dtype)


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


@dataclass(frozen=True)
class AttentionOps:
    """Attention as a network calls it. In which order `attention` is tried: `backends.order`."""

    attention: Op = op(
        attention, "triton", "cudnn", "torch-flash", "flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers"
    )
    linear_attention: Op = op(linear_attention, "triton")
