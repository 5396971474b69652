"""Forward attention with an online softmax: no score matrix, no mask in memory (arXiv 2205.14135)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ConfigError
from . import launch

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Config:
    """Queries and keys per tile, padded head dim, warps, and depth of the load pipeline."""

    queries: int
    keys: int
    dim: int
    warps: int
    stages: int


# padded head dim -> queries, keys, warps, stages: the largest tiles that spill no register (tests/offline)
_TILES = {
    80: {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},  # 163 KiB of shared memory
    86: {64: (128, 64, 8, 2), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},  # 99 KiB: 8.6, 8.9, 12.x
    90: {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},  # 227 KiB
    100: {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
}


def config(queries: int, head_dim: int, dtype: torch.dtype, arch: int) -> Config:
    """Tile for `queries` rows of `head_dim` on compute capability `arch` (90 for 9.0).

    Head dims are padded to 64, 128 or 256; few queries take tiles of 64.
    """
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ConfigError(f"attention: head dims up to {MAX_HEAD_DIM}, got {head_dim}")
    if dtype not in DTYPES:
        raise ConfigError(f"attention: needs bfloat16 or float16, got {dtype}")
    dim = max(launch.power_of_two(head_dim), 64)
    chip = 80 if arch < 86 else 90 if arch == 90 else 100 if 100 <= arch < 120 else 86
    m, n, warps, stages = _TILES[chip][dim]
    if queries <= 64:
        m, n, warps = 64, min(n, 64), 8 if dim == 256 else 4
    return Config(m, n, dim, warps, stages)


@triton.jit
def _accumulate(
    acc, top, total, q, k, v, start, stop, count, k_row, v_row, head_dim, scale,
    MASKED: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Folds keys start..stop into the running softmax; `top` is in the units of the unscaled scores."""
    key = tl.arange(0, N)[:, None]
    col = tl.arange(0, D)[None, :]
    k_tile, v_tile = k + (key * k_row + col), v + (key * v_row + col)
    k_at, v_at = tl.cast(start, tl.int64) * k_row, tl.cast(start, tl.int64) * v_row
    for at in tl.range(start, stop, N):
        if MASKED:
            live = (at + key < count) & (col < head_dim)
            k_block = tl.load(k_tile + k_at, live, other=0.0)
            v_block = tl.load(v_tile + v_at, live, other=0.0)
        elif PADDED:
            k_block = tl.load(k_tile + k_at, col < head_dim, other=0.0)
            v_block = tl.load(v_tile + v_at, col < head_dim, other=0.0)
        else:
            k_block, v_block = tl.load(k_tile + k_at), tl.load(v_tile + v_at)
        scores = tl.dot(q, tl.trans(k_block))
        if MASKED:
            scores = tl.where(at + tl.arange(0, N)[None, :] < count, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores * scale - (higher * scale)[:, None])
        decay = tl.exp2((top - higher) * scale)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * decay[:, None])
        top = higher
        k_at += N * k_row
        v_at += N * v_row
    return acc, top, total


@triton.jit
def _attention(
    q, k, v, lengths, out, queries, keys, heads, head_dim, scale, q_batch, q_row, q_head,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # one program: M queries of one head; programs that share keys are neighbours
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    col = tl.arange(0, D)[None, :]
    live = (query < queries) & (col < head_dim)
    row = query.to(tl.int64)
    q_tile = tl.load(q + batch * q_batch + head * q_head + row * q_row + col, live, other=0.0)
    count = keys
    if lengths is not None:
        count = tl.minimum(tl.load(lengths + batch), keys).to(tl.int32)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    acc = tl.full([M, D], 0.0, tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.full([M], 0.0, tl.float32)
    whole = count // N * N
    acc, top, total = _accumulate(
        acc, top, total, q_tile, k, v, 0, whole, count, k_row, v_row, head_dim, scale, False, PADDED, N, D
    )
    acc, top, total = _accumulate(
        acc, top, total, q_tile, k, v, whole, count, count, k_row, v_row, head_dim, scale, True, PADDED, N, D
    )
    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # no key at all: zeros
    at = ((batch * queries + row) * heads + head) * head_dim + col
    tl.store(out + at, y.to(out.dtype.element_ty), live)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
    b, _, h, d = q.shape
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError(f"attention: q, k and v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not k.shape == v.shape == (b, k.shape[1], h, d):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ConfigError(f"attention: needs [B, Sq, H, D] and twice [B, S, H, D], got {shapes}")
    if d > 1 and any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ConfigError("attention: the last dimension of q, k and v must be contiguous")
    if max(b, h) > 65535:
        raise ConfigError(f"attention: at most 65535 samples and heads, got {b} and {h}")
    if lengths is not None and not (lengths.shape == (b,) and lengths.dtype == torch.int64 and lengths.is_contiguous()):
        raise ConfigError(f"attention: lengths are int64 [{b}], got {lengths.dtype} {tuple(lengths.shape)}")


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """`ops.attention` on the GPU: q [B, Sq, H, D], k, v [B, S, H, D] in any batch, row and head strides.

    bfloat16 or float16, D <= 256. Returns [B, Sq, H*D], contiguous. Scores and softmax are float32;
    the probabilities are rounded to the storage dtype before they meet v. A sample without keys
    gives zeros.
    """
    _check(q, k, v, lengths)
    b, queries, h, d = q.shape
    c = config(queries, d, q.dtype, launch.arch(q))
    out = torch.empty(b, queries, h * d, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    with torch.cuda.device_of(q):
        _attention[(launch.ceil_div(queries, c.queries), h, b)](
            q, k, v, lengths, out, queries, k.shape[1], h, d, math.log2(math.e) / math.sqrt(d),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], d != c.dim, c.queries, c.keys, c.dim,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return out
