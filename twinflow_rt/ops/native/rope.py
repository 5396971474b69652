"""The norms and rotations of heads of ops/rope.py by the kernels of csrc."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .register import address, op, run


def _rotate(
    qkv: Tensor, out: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
    parts: int,
) -> None:  # fmt: skip
    """q and k (parts 3: and v) of qkv [B, S, 3*H*D] to the same places of out, in any batch and row strides."""
    batch, seq, width = qkv.shape
    dim = width // (3 * heads)
    if dim * 3 * heads != width or dim % 2 or dim == 0 or qkv.stride(2) != 1:
        raise ValueError(f"qkv must be [B, S, 3 * {heads} * even] with adjacent elements, got {tuple(qkv.shape)}")
    q, k = _head_weight(q_weight, qkv, dim), _head_weight(k_weight, qkv, dim)
    part, source, target = heads * dim, (qkv.data_ptr(), *qkv.stride()), (out.data_ptr(), *out.stride())
    run(
        "qk_norm_rope", qkv, source, part, target, part, address(q), address(k),
        _angles(cos, sin, qkv, dim // 2), (batch, seq, dim), heads, parts, eps,
    )  # fmt: skip


def _head_weight(weight: Tensor | None, qkv: Tensor, dim: int) -> Tensor | None:
    """The weight [D] of a norm of heads, contiguous, or None. Raises ValueError, TypeError for another."""
    if weight is None:
        return None
    if weight.shape != (dim,):
        raise ValueError(f"norm weights of heads are [{dim}], not {tuple(weight.shape)}")
    if weight.dtype != torch.float32 or weight.device != qkv.device:
        raise TypeError(f"norm weights are float32 on {qkv.device}, not {weight.dtype} on {weight.device}")
    return weight.contiguous()


def _angles(cos: Tensor, sin: Tensor, qkv: Tensor, half: int) -> tuple[int, int, int, int, Tensor, Tensor]:
    """twinflow_angles of cos and sin, [B or 1, S, half] float32; copied only if elements of a row are not adjacent.
    Raises ValueError, TypeError for others."""
    (batch, seq, _), shape, device = qkv.shape, cos.shape, qkv.device
    if shape not in ((1, seq, half), (batch, seq, half)) or sin.shape != shape:
        raise ValueError(f"cos and sin are [{batch} or 1, {seq}, {half}], not {tuple(shape)}, {tuple(sin.shape)}")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.device != device or sin.device != device:
        raise TypeError(f"cos and sin are float32 on {device}")
    strides = cos.stride()
    if strides != sin.stride() or strides[2] != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
        strides = cos.stride()
    return cos.data_ptr(), sin.data_ptr(), 0 if shape[0] == 1 else strides[0], strides[1], cos, sin


def _nothing(*_: Any) -> None:
    """In place: there is no result."""


@op(
    "qk_norm_rope_(Tensor(a!) qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int heads, float eps)"
    " -> ()",
    _nothing,
)
def _qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> None:
    _rotate(qkv, qkv, q_weight, k_weight, cos, sin, heads, eps, parts=2)


def _joint_buffer(qkv: Sequence[Tensor], *_: Any) -> Tensor:
    return qkv[0].new_empty((qkv[0].shape[0], sum(x.shape[1] for x in qkv), qkv[0].shape[2]))


@op(
    "joint_qk_norm_rope(Tensor[] qkv, Tensor[] q_weights, Tensor[] k_weights, Tensor cos, Tensor sin, int heads,"
    " float eps) -> Tensor",
    _joint_buffer,
)
def _joint_qk_norm_rope(
    qkv: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor], cos: Tensor, sin: Tensor,
    heads: int, eps: float,
) -> Tensor:  # fmt: skip
    joint, lengths = _joint_buffer(qkv), [x.shape[1] for x in qkv]
    pieces = joint.split(lengths, 1), cos.split(lengths, 1), sin.split(lengths, 1)
    for x, q_weight, k_weight, out, c, s in zip(qkv, q_weights, k_weights, *pieces, strict=True):
        if x.dtype != joint.dtype or x.shape[0] != joint.shape[0] or x.shape[2] != joint.shape[2]:
            raise ValueError("streams of one joint sequence differ in length only")
        _rotate(x if x.stride(2) == 1 else x.contiguous(), out, q_weight, k_weight, c, s, heads, eps, parts=3)
    return joint


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops/rope.py; writes q and k in place."""
    _qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps)
    q, k, v = torch.unflatten(qkv, -1, (3, heads, -1)).unbind(-3)
    return q, k, v


def joint_qk_norm_rope(
    qkv: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor],
    cos: Tensor, sin: Tensor, heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ops/rope.py; the results are views of one joint buffer."""
    joint = _joint_qk_norm_rope(list(qkv), list(q_weights), list(k_weights), cos, sin, heads, eps)
    q, k, v = torch.unflatten(joint, -1, (3, heads, -1)).unbind(-3)
    return q, k, v


@op(
    "grouped_qk_norm_rope_(Tensor(a!) qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int heads,"
    " int kv_heads, float eps) -> ()",
    _nothing,
)
def _grouped_qk_norm_rope(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int,
    kv_heads: int, eps: float,
) -> None:  # fmt: skip
    batch, seq, width = qkv.shape
    dim = width // (heads + 2 * kv_heads)
    if dim * (heads + 2 * kv_heads) != width or dim % 2 or dim == 0 or qkv.stride(2) != 1:
        raise ValueError(
            f"qkv must be [B, S, {heads} + 2 * {kv_heads} heads of an even size] with adjacent elements, "
            f"got {tuple(qkv.shape)}"
        )
    q, k = _head_weight(q_weight, qkv, dim), _head_weight(k_weight, qkv, dim)
    run(
        "grouped_qk_norm_rope", qkv, (qkv.data_ptr(), *qkv.stride()), address(q), address(k),
        _angles(cos, sin, qkv, dim // 2), (batch, seq, dim), heads, kv_heads, eps,
    )  # fmt: skip


def grouped_qk_norm_rope(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int,
    kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ops/rope.py; writes q and k in place."""
    _grouped_qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, kv_heads, eps)
    parts = torch.unflatten(qkv, -1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = parts.split_with_sizes((heads, kv_heads, kv_heads), 1)
    return q, k, v
