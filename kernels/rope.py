"""QK RMSNorm + rotary embedding on the merged QKV projection, in place or into joint buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .register import torch_op


@dataclass(frozen=True)
class Config:
    """Heads of one token per program, pairs per head (padded), and warps."""

    heads: int
    pairs: int
    warps: int


def config(heads: int, head_dim: int) -> Config:
    """Tile for `heads` heads of `head_dim`: up to 2048 elements a program, 16 a thread."""
    if head_dim % 2 or not 0 < head_dim <= 512:
        raise ValueError(f"rope: needs an even head dim up to 512, got {head_dim}")
    pairs = launch.power_of_two(head_dim // 2)
    tile = min(launch.power_of_two(heads), max(1024 // pairs, 1))
    return Config(tile, pairs, max(2 * tile * pairs // 512, 1))


@triton.jit
def _qk_norm_rope(
    qkv, out, q_weight, k_weight, cos, sin, seq, heads, half, qkv_batch, qkv_row, qkv_part,
    out_batch, out_row, out_part, angle_batch, angle_row, eps, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    # one program: some heads of one token of q (part 0), k (1) or, where it moves too, v (2)
    row, part = tl.program_id(0), tl.program_id(1)
    batch, s = (row // seq).to(tl.int64), (row % seq).to(tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    lane = 2 * pair[:, None] + tl.arange(0, 2)[None, :]  # of one head, as interleaved pairs
    mask = (head < heads)[:, None, None] & (lane < 2 * half)[None, :, :]
    at = (head * 2 * half)[:, None, None] + lane[None, :, :]
    x = tl.load(qkv + batch * qkv_batch + s * qkv_row + part * qkv_part + at, mask, other=0.0)
    target = out + batch * out_batch + s * out_row + part * out_part + at
    if part == 2:
        tl.store(target, x, mask)
    else:
        weight = k_weight if part == 1 else q_weight
        w = tl.load(weight + lane, lane < 2 * half, other=0.0)
        v = x.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(tl.sum(v * v, 2), 1) / (2 * half) + eps)
        v = (v * inverse[:, None, None] * w[None, :, :]).to(x.dtype).to(tl.float32)
        re, im = tl.split(v)
        angle = batch * angle_batch + s * angle_row + pair
        c = tl.load(cos + angle, pair < half, other=0.0)[None, :]
        d = tl.load(sin + angle, pair < half, other=0.0)[None, :]
        tl.store(target, tl.join(re * c - im * d, re * d + im * c).to(x.dtype), mask)


def _check(where: str, qkv: Tensor, weights: Sequence[Tensor], cos: Tensor, sin: Tensor, heads: int) -> int:
    """Head dim of a well-formed call; ValueError otherwise."""
    launch.require_floats(where, qkv)
    if qkv.dim() != 3 or heads < 1 or qkv.shape[-1] % (3 * heads) or qkv.stride(-1) != 1:
        raise ValueError(f"{where}: qkv {tuple(qkv.shape)} is not [B, S, 3*{heads}*D] with dense rows")
    d = qkv.shape[-1] // (3 * heads)
    if cos.shape not in ((1, qkv.shape[1], d // 2), (qkv.shape[0], qkv.shape[1], d // 2)):
        raise ValueError(f"{where}: cos {tuple(cos.shape)} does not fit qkv {tuple(qkv.shape)}, head dim {d}")
    if sin.shape != cos.shape or sin.stride() != cos.stride():
        raise ValueError(f"{where}: sin {tuple(sin.shape)} is not laid out as cos {tuple(cos.shape)}")
    if any(w.shape != (d,) for w in weights):
        raise ValueError(f"{where}: norm weights are [{d}], got {[tuple(w.shape) for w in weights]}")
    if any(x.dtype != torch.float32 or (x.shape[-1] > 1 and x.stride(-1) != 1) for x in (*weights, cos, sin)):
        raise ValueError(f"{where}: weights and angles are float32 with dense rows")
    return d


def _launch(
    where: str, qkv: Tensor, out: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    heads: int, eps: float, parts: int,
) -> None:  # fmt: skip
    """Reads q|k|v rows of `qkv`, writes `parts` of them to out [B, S, parts, H*D] (it may be the same memory)."""
    d = _check(where, qkv, (q_weight, k_weight), cos, sin, heads)
    c = config(heads, d)
    if not qkv.numel():
        return
    b, s, _ = qkv.shape
    with torch.cuda.device_of(qkv):
        _qk_norm_rope[(b * s, parts, launch.ceil_div(heads, c.heads))](
            qkv, out, q_weight, k_weight, cos, sin, s, heads, d // 2, qkv.stride(0), qkv.stride(1), heads * d,
            out.stride(0), out.stride(1), out.stride(2), cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
            eps, c.heads, c.pairs, num_warps=c.warps,
        )  # fmt: skip


@torch_op(
    "qk_norm_rope_(Tensor(a!) qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int heads, float eps)"
    " -> ()",
    lambda *_: None,
)
def _in_place(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> None:
    _launch("qk_norm_rope", qkv, qkv.unflatten(-1, (3, -1)), q_weight, k_weight, cos, sin, heads, eps, parts=2)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.qk_norm_rope` in place: q and k are rewritten inside `qkv`, and the results are views of it.

    qkv: [B, S, 3*H*D], any batch and row strides; every other argument as the eager reference.
    """
    _in_place(qkv, q_weight, k_weight, cos, sin, heads, eps)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
    return q, k, v


def _joint_like(qkv: Sequence[Tensor], *_: object) -> Tensor:
    """An uninitialised q|k|v buffer of the joint sequence."""
    first = qkv[0]
    shape = first.shape[0], sum(x.shape[1] for x in qkv), first.shape[2]
    return torch.empty(shape, dtype=first.dtype, device=first.device)


@torch_op(
    "joint_qk_norm_rope(Tensor[] qkv, Tensor[] q_weights, Tensor[] k_weights, Tensor cos, Tensor sin, int heads,"
    " float eps) -> Tensor",
    _joint_like,
)
def _jointly(
    qkv: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor], cos: Tensor, sin: Tensor,
    heads: int, eps: float,
) -> Tensor:  # fmt: skip
    lengths, joint = [x.shape[1] for x in qkv], _joint_like(qkv)
    pieces = joint.split(lengths, 1), cos.split(lengths, 1), sin.split(lengths, 1)
    for x, q_weight, k_weight, out, c, s in zip(qkv, q_weights, k_weights, *pieces, strict=True):
        if x.dtype != joint.dtype:
            raise ValueError(f"joint_qk_norm_rope: streams of one dtype, got {x.dtype} and {joint.dtype}")
        parts = out.unflatten(-1, (3, -1))
        _launch("joint_qk_norm_rope", x, parts, q_weight, k_weight, c, s, heads, eps, parts=3)
    return joint


def joint_qk_norm_rope(
    qkv: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor],
    cos: Tensor, sin: Tensor, heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.joint_qk_norm_rope`: each stream goes straight to its rows of one joint q|k|v buffer, of which the
    results are views."""
    joint = _jointly(list(qkv), list(q_weights), list(k_weights), cos, sin, heads, eps)
    q, k, v = joint.unflatten(-1, (3, heads, -1)).unbind(-3)
    return q, k, v
