"""QK RMSNorm + rotary position embedding, from the merged QKV projection to attention's operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .declaration import COMPILED, Op, op
from .norm import rms_norm


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates interleaved pairs: (x[2i] + j x[2i+1]) * (cos[i] + j sin[i])   (arXiv 2104.09864).

    x: [B, S, H, D]; cos, sin: float32 [B or 1, S, D/2]. float32 inside, one rounding.
    """
    re, im = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((re * cos - im * sin, re * sin + im * cos), -1).flatten(-2).to(x.dtype)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits [B, S, 3*H*D] into q | k | v, then q, k <- rotate(rms_norm(head)) per head.

    q_weight, k_weight: float32 [D]; cos, sin: float32 [B or 1, S, D/2]. Returns three [B, S, H, D].
    Implementations may write in place: `qkv` must not be used afterwards.
    Rounding points: after the norm and after the rotation, as the reference networks do.
    """
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
    q = rotate(rms_norm(q, q_weight, eps), cos, sin)
    k = rotate(rms_norm(k, k_weight, eps), cos, sin)
    return q, k, v


def grouped_qk_norm_rope(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int,
    kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`qk_norm_rope` of language models: [B, S, (H + 2*G)*D] with G heads of keys and of values for H of queries,
    rotated by halves. A weight that is None: no norm. Returns [B, H, S, D] and twice [B, G, S, D], as torch's
    attention takes them.
    """
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
    q = q if q_weight is None else rms_norm(q, q_weight, eps)
    k = k if k_weight is None else rms_norm(k, k_weight, eps)
    return _rotate_halves(q, cos, sin), _rotate_halves(k, cos, sin), v


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of pairs (x[i], x[i + D/2]); x: [B, H, S, D]."""
    a, b = x.float().chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def joint_qk_norm_rope(
    qkv: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor],
    cos: Tensor, sin: Tensor, heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`qk_norm_rope` of several streams into one joint sequence, in the order given.

    qkv[i]: [B, S_i, 3*H*D], its norm weights q_weights[i], k_weights[i]: float32 [D]; cos, sin:
    float32 [B or 1, S, D/2], S = sum of S_i. Returns three [B, S, H, D]; rounding points as
    `qk_norm_rope`. Implementations write each stream straight into the joint buffers.
    """
    lengths = [x.shape[1] for x in qkv]
    angles = cos.split(lengths, 1), sin.split(lengths, 1)
    streams = zip(qkv, q_weights, k_weights, *angles, strict=True)
    parts = [qk_norm_rope(*stream, heads, eps) for stream in streams]
    q, k, v = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return q, k, v


@dataclass(frozen=True)
class RopeOps:
    """Rotary embeddings as a network calls them."""

    qk_norm_rope: Op = op(qk_norm_rope, *COMPILED)
    joint_qk_norm_rope: Op = op(joint_qk_norm_rope, *COMPILED)
    grouped_qk_norm_rope: Op = op(grouped_qk_norm_rope, "native")
