"""Attention whose scores are products of float8: queries and keys in e4m3, a scale per token and head.

One kernel quantizes q and k, once, into tiles that the other reads without a mask; an online softmax
(arXiv 2205.14135) follows. The probabilities meet v in its own dtype: e4m3 keeps 4 significant bits of
them, which would cost more than the second product gains, and would need v transposed on 9.0.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .attention import DTYPES, MAX_HEAD_DIM, Config, _check, fold, joined_heads
from .linear import quantized
from .register import torch_op

FP8 = torch.float8_e4m3fn
QUANTIZED_ROWS = 32  # tokens of one head that a program of `_quantize` takes
KEY_MULTIPLE = 128  # quantized keys are padded with zeros to whole tiles

# padded head dim -> queries, keys, warps, stages: the largest tiles that spill no register (tests/offline)
_TILES = {
    89: {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},  # 99 KiB of shared memory: 8.9, 12.x
    90: {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},  # 227 KiB
    100: {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
}


def config(queries: int, head_dim: int, dtype: torch.dtype, arch: int) -> Config:
    """Tile for `queries` rows of `head_dim` on compute capability `arch`, as `attention.config`; from 8.9 on."""
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"attention_fp8: head dims up to {MAX_HEAD_DIM}, got {head_dim}")
    if dtype not in DTYPES:
        raise ValueError(f"attention_fp8: needs bfloat16 or float16, got {dtype}")
    launch.require_quantized("attention_fp8", FP8, arch)
    dim = max(launch.power_of_two(head_dim), 64)
    m, n, warps, stages = _TILES[90 if arch == 90 else 100 if 100 <= arch < 120 else 89][dim]
    if queries <= 64:
        m, n, warps = 64, min(n, 64), 8 if dim == 256 else 4
    return Config(m, n, dim, warps, stages)


@triton.jit
def _quantize(
    x, values, scales, count, rows, heads, head_dim, x_batch, x_row, x_head, ROWS: tl.constexpr, D: tl.constexpr
):
    # to [B, H, rows, D]: beyond `count` tokens and `head_dim` columns zeros, of scale 1e-12 / 448
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, D)[None, :]
    at = batch * x_batch + head * x_head + row.to(tl.int64) * x_row + col
    y = tl.load(x + at, (row < count) & (col < head_dim), other=0.0).to(tl.float32)
    rounded, scale = quantized(y, values.dtype.element_ty)
    place = (batch * heads + head) * rows + row
    tl.store(scales + place, scale, row < rows)
    tl.store(values + place * D + col, rounded, row < rows)


@triton.jit
def _accumulate(
    acc, top, total, q, q_scale, k, k_scales, v, start, stop, count, v_row, head_dim,
    MASKED: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Folds keys start..stop into the running softmax; `top` is in units of q's scale."""
    key = tl.arange(0, N)
    col = tl.arange(0, D)[None, :]
    k_tile, v_tile = k + (key[:, None] * D + col), v + (key[:, None] * v_row + col)
    v_at = tl.cast(start, tl.int64) * v_row
    for at in tl.range(start, stop, N):
        k_block = tl.load(k_tile + tl.cast(at, tl.int64) * D)
        if MASKED:
            v_block = tl.load(v_tile + v_at, (at + key[:, None] < count) & (col < head_dim), other=0.0)
        elif PADDED:
            v_block = tl.load(v_tile + v_at, col < head_dim, other=0.0)
        else:
            v_block = tl.load(v_tile + v_at)
        scores = tl.dot(q, tl.trans(k_block)) * tl.load(k_scales + at + key)[None, :]
        acc, top, total = fold(acc, top, total, scores, v_block, at, count, q_scale, q_scale[:, None], MASKED, N)
        v_at += N * v_row
    return acc, top, total


@triton.jit
def _attention(
    q, q_scales, k, k_scales, v, lengths, out, queries, q_rows, keys, k_rows, heads, head_dim, scale,
    v_batch, v_row, v_head, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # one program: M queries of one head; q and k are [B, H, rows, D], rows a multiple of every tile
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    col = tl.arange(0, D)[None, :]
    at = (batch * heads + head) * q_rows + row
    q_tile = tl.load(q + at[:, None] * D + col)
    q_scale = tl.load(q_scales + at) * scale
    count = keys
    if lengths is not None:
        count = tl.minimum(tl.load(lengths + batch), keys).to(tl.int32)
    k += (batch * heads + head) * k_rows * D
    k_scales += (batch * heads + head) * k_rows
    v += batch * v_batch + head * v_head
    acc = tl.full([M, D], 0.0, tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.full([M], 0.0, tl.float32)
    whole = count // N * N
    acc, top, total = _accumulate(
        acc, top, total, q_tile, q_scale, k, k_scales, v, 0, whole, count, v_row, head_dim, False, PADDED, N, D
    )
    acc, top, total = _accumulate(
        acc, top, total, q_tile, q_scale, k, k_scales, v, whole, count, count, v_row, head_dim, True, PADDED, N, D
    )
    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # no key at all: zeros
    place = ((batch * queries + row[:, None].to(tl.int64)) * heads + head) * head_dim + col
    tl.store(out + place, y.to(out.dtype.element_ty), (row[:, None] < queries) & (col < head_dim))


def _heads(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x [B, S, H, D] in any strides as e4m3 [B, H, rows, dim] and float32 scales [B, H, rows]."""
    b, count, h, d = x.shape
    rows = launch.ceil_div(count, KEY_MULTIPLE) * KEY_MULTIPLE
    values = torch.empty(b, h, rows, dim, dtype=FP8, device=x.device)
    scales = torch.empty(b, h, rows, dtype=torch.float32, device=x.device)
    if rows:
        grid = (rows // QUANTIZED_ROWS, h, b)
        _quantize[grid](x, values, scales, count, rows, h, d, *x.stride()[:3], QUANTIZED_ROWS, dim, num_warps=4)
    return values, scales


@torch_op("attention_fp8(Tensor q, Tensor k, Tensor v, Tensor? lengths=None) -> Tensor", joined_heads)
def attention_fp8(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """`ops.attention_fp8` on the GPU: q [B, Sq, H, D], k, v [B, S, H, D] in any batch, row and head strides.

    bfloat16 or float16, D <= 256, compute capability 8.9 or later. Returns [B, Sq, H*D], contiguous. Scores
    and softmax are float32; the probabilities are rounded to the storage dtype before they meet v. A sample
    without keys gives zeros. Values of v beyond `lengths` have weight 0, so they must be finite.
    """
    _check(q, k, v, lengths)
    b, queries, h, d = q.shape
    c = config(queries, d, q.dtype, launch.arch(q))
    out = torch.empty(b, queries, h * d, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    with torch.cuda.device_of(q):
        (q8, q_scales), (k8, k_scales) = _heads(q, c.dim), _heads(k, c.dim)
        _attention[(launch.ceil_div(queries, c.queries), h, b)](
            q8, q_scales, k8, k_scales, v, lengths, out, queries, q8.shape[2], k.shape[1], k8.shape[2], h, d,
            math.log2(math.e) / math.sqrt(d), *v.stride()[:3], d != c.dim, c.queries, c.keys, c.dim,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return out
