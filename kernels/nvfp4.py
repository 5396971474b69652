"""Rows quantized to NVIDIA's 4-bit floats, with their block scales where the tensor cores of 12.0 read them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .register import torch_op

BLOCK = 16  # values that share a scale
ROWS = 32  # of a program: one column of the tiles of 128 x 4 in which scales lie
INNER = 256


@triton.jit
def _code(value):
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even code, and 8 for a minus sign."""
    size = tl.abs(value)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75) + (size > 1.25) + (size >= 1.75) + (size > 2.5)
    return code + (size >= 3.5) + (size > 5.0) + 8 * (value < 0)


@triton.jit
def _quantize(x, packed, scales, whole, count, width, x_row, columns, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    # programs past the end write the zeros that fill the last tiles
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    col = tl.program_id(1) * BLOCKS * 16 + tl.arange(0, BLOCKS * 16)
    mask = (row < count)[:, None] & (col < width)[None, :]
    v = tl.load(x + row.to(tl.int64)[:, None] * x_row + col[None, :], mask, other=0.0).to(tl.float32)
    blocks = tl.reshape(v, (ROWS, BLOCKS, 16))
    scale = tl.load(whole)
    top = tl.max(tl.abs(blocks), 2)
    block_scale = tl.minimum(tl.maximum(tl.div_rn(top, 6.0 * scale), 0.001953125), 448.0).to(tl.float8e4nv)
    values = tl.div_rn(blocks, (block_scale.to(tl.float32) * scale)[:, :, None])
    low, high = tl.split(tl.reshape(_code(values), (ROWS, BLOCKS * 8, 2)))
    byte = tl.program_id(1) * BLOCKS * 8 + tl.arange(0, BLOCKS * 8)
    target = packed + row.to(tl.int64)[:, None] * (width // 2) + byte[None, :]
    tl.store(target, (low | (high << 4)).to(tl.uint8), (row < count)[:, None] & (byte < width // 2)[None, :])
    tile = (row // 128).to(tl.int64)[:, None] * (columns // 4) + block[None, :] // 4
    place = tile * 512 + (row % 32)[:, None] * 16 + (row % 128 // 32)[:, None] * 4 + block[None, :] % 4
    live = (row < count)[:, None] & (block < width // 16)[None, :]
    bits = tl.where(live, block_scale.to(tl.uint8, bitcast=True), 0)
    tl.store(scales + place, bits, (block < columns)[None, :])


def _empty(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    scales = 128 * launch.ceil_div(rows, 128), 4 * launch.ceil_div(width // BLOCK, 4)
    make = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device=x.device)
    return (
        make(rows, width // 2, dtype=torch.uint8), make(*scales, dtype=torch.float8_e4m3fn),
        make(1, dtype=torch.float32),
    )  # fmt: skip


@torch_op("quantize_nvfp4(Tensor x) -> (Tensor, Tensor, Tensor)", _empty)
def quantize_nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.quantize_nvfp4` on the GPU: x [..., K], any row strides, K a multiple of 16; 8.9 or later.

    Two passes over x: for the largest magnitude of all, and for the values."""
    launch.require_floats("quantize_nvfp4", x)
    launch.require_quantized("quantize_nvfp4", torch.float8_e4m3fn, launch.arch(x))
    width = x.shape[-1]
    if width % BLOCK:
        raise ValueError(f"quantize_nvfp4: rows of a multiple of {BLOCK} elements, got {width}")
    packed, scales, whole = _empty(x)
    if not x.numel():
        return packed, scales, whole.fill_(1e-12)
    x = x.reshape(-1, width)
    x = x if x.stride(-1) == 1 else x.contiguous()
    torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32, out=whole[0])
    whole.div_(6 * 448).clamp_min_(1e-12)
    with torch.cuda.device_of(x):
        _quantize[(scales.shape[0] // ROWS, launch.ceil_div(scales.shape[1] * BLOCK, INNER))](
            x, packed, scales.view(torch.uint8), whole, len(x), width, x.stride(0), scales.shape[1], ROWS,
            INNER // BLOCK, num_warps=4,
        )  # fmt: skip
    return packed, scales, whole
