"""Forward attention with an online softmax: no score matrix, no mask in memory (arXiv 2205.14135).

Two kernels: `_attention` for every chip, and `_specialized` for 9.0, where one warp group feeds key
and value tiles through the tensor memory accelerator to two others that compute (arXiv 2407.08608).
Linear attention (arXiv 2410.10629) takes two more: the state of every head by chunks of keys, and its use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .register import torch_op

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_ROW_STRIDE = 2**23  # offsets inside a tile of keys are 32 bits
MAX_LINEAR_HEAD_DIM = 32  # its D x D state stays in registers


@dataclass(frozen=True)
class Config:
    """Queries and keys per tile, padded head dim, warps, depth of the load pipeline, and which kernel."""

    queries: int
    keys: int
    dim: int
    warps: int
    stages: int
    specialized: bool = False


# padded head dim -> queries, keys, warps, stages: the largest tiles that spill no register (tests/offline)
_TILES = {
    80: {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},  # 163 KiB of shared memory
    86: {64: (128, 64, 8, 2), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},  # 99 KiB: 8.6, 8.9, 12.x
    90: {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},  # 227 KiB
    100: {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
}
# of `_specialized`; the compiler divides the work among warp groups at 4 warps only, and adds 8 of its own
_SPECIALIZED = {64: (128, 128, 4, 3), 128: (128, 128, 4, 2)}


def config(queries: int, head_dim: int, dtype: torch.dtype, arch: int, aligned: bool = True) -> Config:
    """Tile for `queries` rows of `head_dim` on compute capability `arch` (90 for 9.0).

    Head dims are padded to 64, 128 or 256; few queries take tiles of 64. aligned: whether the tensor
    memory accelerator can address q, k and v (base and strides are multiples of 16 bytes, and keys exist).
    """
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"attention: head dims up to {MAX_HEAD_DIM}, got {head_dim}")
    if dtype not in DTYPES:
        raise ValueError(f"attention: needs bfloat16 or float16, got {dtype}")
    dim = max(launch.power_of_two(head_dim), 64)
    chip = 80 if arch < 86 else 90 if arch == 90 else 100 if 100 <= arch < 120 else 86
    if chip == 90 and dim in _SPECIALIZED and queries > 64 and aligned:
        m, n, warps, stages = _SPECIALIZED[dim]
        return Config(m, n, dim, warps, stages, specialized=True)
    m, n, warps, stages = _TILES[chip][dim]
    if queries <= 64:
        m, n, warps = 64, min(n, 64), 8 if dim == 256 else 4
    return Config(m, n, dim, warps, stages)


@triton.jit
def fold(acc, top, total, scores, v_block, at, count, scale, across, MASKED: tl.constexpr, N: tl.constexpr):
    """Folds the `scores` [M, N] of keys at..at + N, and their values, into the running softmax.

    scale: of the scores, one for all or one a query; across: the same, as it meets [M, N]. `top`: unscaled."""
    if MASKED:
        scores = tl.where(at + tl.arange(0, N)[None, :] < count, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores * across - (higher * scale)[:, None])
    decay = tl.exp2((top - higher) * scale)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v_block.dtype), v_block, acc * decay[:, None])
    return acc, higher, total


@triton.jit
def _accumulate(
    acc, top, total, q, k, v, start, stop, count, k_row, v_row, head_dim, scale,
    MASKED: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Folds keys start..stop into the running softmax."""
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
        acc, top, total = fold(acc, top, total, scores, v_block, at, count, scale, scale, MASKED, N)
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


@triton.jit
def _specialized(
    q, k, v, lengths, out, queries, keys, heads, head_dim, scale, q_batch, q_row, q_head,
    MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # k and v are descriptors of [B, H, S, head_dim]; what they load beyond a bound is zero. The loop loads and
    # ends the kernel's matrix products: otherwise the compiler does not specialise it
    first, head, batch = tl.program_id(0) * M, tl.program_id(1), tl.program_id(2)
    start = q + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    q_tile = tl.make_tensor_descriptor(start, [queries, head_dim], [q_row, 1], [M, D]).load([first, 0])
    count = keys
    if lengths is not None:
        count = tl.minimum(tl.load(lengths + batch), keys).to(tl.int32)
    acc = tl.full([M, D], 0.0, tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.full([M], 0.0, tl.float32)
    for at in tl.range(0, count, N, warp_specialize=True):
        k_block = k.load([batch, head, at, 0]).reshape(N, D)
        v_block = v.load([batch, head, at, 0]).reshape(N, D)
        scores = tl.dot(q_tile, tl.trans(k_block))
        acc, top, total = fold(acc, top, total, scores, v_block, at, count, scale, scale, MASKED, N)
    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # no key at all: zeros
    row = first + tl.arange(0, M)[:, None]
    col = tl.arange(0, D)[None, :]
    at = ((batch.to(tl.int64) * queries + row) * heads + head) * head_dim + col
    tl.store(out + at, y.to(out.dtype.element_ty), (row < queries) & (col < head_dim))


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
    b, _, h, d = q.shape
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k and v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not k.shape == v.shape == (b, k.shape[1], h, d):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention: needs [B, Sq, H, D] and twice [B, S, H, D], got {shapes}")
    if d > 1 and any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("attention: the last dimension of q, k and v must be contiguous")
    if max(k.stride(1), v.stride(1)) > MAX_ROW_STRIDE:
        raise ValueError(f"attention: rows of k and v at most {MAX_ROW_STRIDE} elements apart, got {k.stride(1)}")
    if max(b, h) > 65535:
        raise ValueError(f"attention: at most 65535 samples and heads, got {b} and {h}")
    if lengths is not None and not (lengths.shape == (b,) and lengths.dtype == torch.int64 and lengths.is_contiguous()):
        raise ValueError(f"attention: lengths are int64 [{b}], got {lengths.dtype} {tuple(lengths.shape)}")


def _aligned(*tensors: Tensor) -> bool:
    return all(
        x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
        for x in tensors
    )


def _tiles(x: Tensor, c: Config) -> TensorDescriptor:
    """Tiles of c.keys rows of one head of x [B, S, H, D]."""
    x = x.transpose(1, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, c.keys, c.dim])


def joined_heads(q: Tensor, *_: object) -> Tensor:
    """An uninitialised result, [B, Sq, H*D], for queries [B, Sq, H, D]."""
    return q.new_empty((*q.shape[:2], q.shape[2] * q.shape[3]))


@torch_op("attention(Tensor q, Tensor k, Tensor v, Tensor? lengths=None) -> Tensor", joined_heads)
def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """`ops.attention` on the GPU: q [B, Sq, H, D], k, v [B, S, H, D] in any batch, row and head strides.

    bfloat16 or float16, D <= 256. Returns [B, Sq, H*D], contiguous. Scores and softmax are float32;
    the probabilities are rounded to the storage dtype before they meet v. A sample without keys
    gives zeros. Values beyond `lengths` have weight 0, so they must be finite.
    Operands off 16-byte boundaries (no network's) are served by slower loads.
    """
    _check(q, k, v, lengths)
    b, queries, h, d = q.shape
    keys, scale = k.shape[1], math.log2(math.e) / math.sqrt(d)
    out = torch.empty(b, queries, h * d, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    c = config(queries, d, q.dtype, launch.arch(q), aligned=keys > 0 and _aligned(q, k, v))
    grid = (launch.ceil_div(queries, c.queries), h, b)
    options = dict(num_warps=c.warps, num_stages=c.stages)
    with torch.cuda.device_of(q):
        if c.specialized:
            masked = lengths is not None or keys % c.keys > 0
            launch.with_scratch(
                q.device, _specialized[grid], q, _tiles(k, c), _tiles(v, c), lengths, out, queries, keys, h, d,
                scale, *q.stride()[:3], masked, c.queries, c.keys, c.dim, **options,
            )  # fmt: skip
        else:
            _attention[grid](
                q, k, v, lengths, out, queries, keys, h, d, scale, *q.stride()[:3], *k.stride()[:3],
                *v.stride()[:3], d != c.dim, c.queries, c.keys, c.dim, **options,
            )  # fmt: skip
    return out


@dataclass(frozen=True)
class LinearConfig:
    """Rows per tile and padded head dim; keys in one program's part of the state."""

    rows: int
    dim: int
    chunk: int


def linear_config(keys: int, head_dim: int) -> LinearConfig:
    """Chunks of 256 keys, so that few heads fill the chip, and no more than 32 of them to add up."""
    if not 0 < head_dim <= MAX_LINEAR_HEAD_DIM:
        raise ValueError(f"linear_attention: head dims up to {MAX_LINEAR_HEAD_DIM}, got {head_dim}")
    return LinearConfig(64, max(launch.power_of_two(head_dim), 16), 256 * max(launch.ceil_div(keys, 256 * 32), 1))


@triton.jit
def _rows(x, batch_stride, row_stride, head_stride, first, count, head_dim, ROWS: tl.constexpr, D: tl.constexpr):
    row, col = first + tl.arange(0, ROWS)[:, None], tl.arange(0, D)[None, :]
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    at = batch * batch_stride + head * head_stride + row.to(tl.int64) * row_stride + col
    return tl.load(x + at, (row < count) & (col < head_dim), other=0.0)


@triton.jit
def _linear_state(
    k, v, states, sums, keys, heads, head_dim, k_batch, k_row, k_head, v_batch, v_row, v_head,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # relu(k)^T v and the sum of relu(k) over one chunk of one head's keys
    state = tl.full([D, D], 0.0, tl.float32)
    total = tl.full([D], 0.0, tl.float32)
    start = tl.program_id(0) * CHUNK
    for at in tl.range(start, tl.minimum(start + CHUNK, keys), ROWS):
        k_block = _rows(k, k_batch, k_row, k_head, at, keys, head_dim, ROWS, D)
        v_block = _rows(v, v_batch, v_row, v_head, at, keys, head_dim, ROWS, D)
        positive = tl.maximum(k_block.to(tl.float32), 0.0)
        state = tl.dot(tl.trans(positive.to(k_block.dtype)), v_block, state, input_precision="tf32x3")
        total += tl.sum(positive, 0)
    part = (tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    row, col = tl.arange(0, D)[:, None], tl.arange(0, D)[None, :]
    tl.store(states + part * D * D + row * D + col, state)
    tl.store(sums + part * D + tl.arange(0, D), total)


@triton.jit
def _linear_apply(
    q, states, sums, out, queries, heads, head_dim, chunks, q_batch, q_row, q_head, ROWS: tl.constexpr, D: tl.constexpr
):
    first, head, batch = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, col = tl.arange(0, D)[:, None], tl.arange(0, D)[None, :]
    part = (batch * heads + head) * chunks
    state = tl.full([D, D], 0.0, tl.float32)
    total = tl.full([D], 0.0, tl.float32)
    for c in tl.range(0, chunks):
        state += tl.load(states + (part + c) * D * D + row * D + col)
        total += tl.load(sums + (part + c) * D + tl.arange(0, D))
    positive = tl.maximum(_rows(q, q_batch, q_row, q_head, first, queries, head_dim, ROWS, D).to(tl.float32), 0.0)
    y = tl.dot(positive, state, input_precision="tf32x3")
    y = y / (tl.sum(positive * total[None, :], 1) + 1e-15)[:, None]
    query = first + tl.arange(0, ROWS)[:, None]
    at = ((batch * queries + query) * heads + head) * head_dim + col
    tl.store(out + at, y.to(out.dtype.element_ty), (query < queries) & (col < head_dim))


@torch_op("linear_attention(Tensor q, Tensor k, Tensor v) -> Tensor", joined_heads)
def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.linear_attention` on the GPU: q, k, v [B, S, H, D] in any batch, row and head strides, D <= 32.

    bfloat16, float16 or float32. Returns [B, S, H*D], contiguous. Sums are float32, the chunks of keys
    in a fixed order; float32 operands of the tensor cores are split in three (tf32x3), which keeps 22 bits.
    """
    launch.require_floats("linear_attention", q, k, v)
    _check(q, k, v, None)
    b, queries, h, d = q.shape
    keys = k.shape[1]
    c = linear_config(keys, d)
    out = torch.empty(b, queries, h * d, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    chunks = max(launch.ceil_div(keys, c.chunk), 1)
    states = torch.empty(b, h, chunks, c.dim, c.dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(b, h, chunks, c.dim, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _linear_state[(chunks, h, b)](
            k, v, states, sums, keys, h, d, *k.stride()[:3], *v.stride()[:3], c.chunk, c.rows, c.dim, num_warps=4
        )
        _linear_apply[(launch.ceil_div(queries, c.rows), h, b)](
            q, states, sums, out, queries, h, d, chunks, *q.stride()[:3], c.rows, c.dim, num_warps=4
        )
    return out
