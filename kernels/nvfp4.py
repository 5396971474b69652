"""Linear layers in NVIDIA's 4-bit floats: a kernel that quantizes rows, and cuBLAS's product of them and a weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .register import torch_op

GROUP = 16  # values that share a scale
TILE = (128, 4)  # rows and groups whose scales lie together, [32, 4, 4]: those of row r behind those of row r - 32
ROWS, INNER = 32, 256  # of a program


def _filled(rows: int, groups: int) -> tuple[int, int]:
    """The shape of group scales with their last tiles filled."""
    return tuple(launch.ceil_div(n, tile) * tile for n, tile in zip((rows, groups), TILE, strict=True))


def arranged(scales: Tensor) -> Tensor:
    """Group scales [R, C] as products read them: in tiles, filled with zeros."""
    rows, groups = _filled(*scales.shape)
    filled = F.pad(scales.view(torch.uint8), (0, groups - scales.shape[1], 0, rows - scales.shape[0]))
    tiles = filled.view(-1, 4, 32, groups // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, groups).view(scales.dtype)


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


def quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows x [R, K], K a multiple of 16, as codes [R, K / 2], group scales that are `arranged` in [R', K' / 16], and
    the scale of all, float32 [1]: bit for bit those of `ops.nvfp4`. Two passes over x, one for its largest magnitude.
    """
    count, width = x.shape
    packed = torch.empty(count, width // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(_filled(count, width // GROUP), dtype=torch.uint8, device=x.device)
    whole = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).view(1)
    whole = whole.div_(6 * 448).clamp_min_(1e-12)
    with torch.cuda.device_of(x):
        _quantize[(scales.shape[0] // ROWS, launch.ceil_div(scales.shape[1] * GROUP, INNER))](
            x, packed, scales, whole, count, width, x.stride(0), scales.shape[1], ROWS, INNER // GROUP, num_warps=4
        )
    return packed, scales.view(torch.float8_e4m3fn), whole


def product(rows: tuple[Tensor, ...], weight: tuple[Tensor, ...], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows weight^T + bias by cuBLAS: codes, arranged group scales and the scale of each; K and N multiples of 32."""
    (a, *a_scales), (b, *b_scales) = rows, weight
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    order = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    a, b = a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2).t()
    return F.scaled_mm(a, b, a_scales, recipe, b_scales, recipe, order, order, bias, dtype)


@torch_op(
    "linear_nvfp4(Tensor x, Tensor packed, Tensor group_scales, Tensor? group_minimums, Tensor scales, Tensor? bias)"
    " -> Tensor",
    lambda x, packed, *_: x.new_empty((*x.shape[:-1], packed.shape[0])),
)
def linear_nvfp4(
    x: Tensor, packed: Tensor, group_scales: Tensor, group_minimums: Tensor | None, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """`ops.linear_nvfp4` on compute capability 12.0: x [..., K] in any row strides. The weight's group scales, 1/8 of
    its bytes, are arranged in every call."""
    launch.require_floats("linear_nvfp4", x)
    n, k = packed.shape[0], x.shape[-1]
    if k % GROUP or packed.shape != (n, k // 2) or group_scales.shape != (n, k // GROUP) or group_minimums is not None:
        shapes = ", ".join(str(tuple(t.shape)) for t in (packed, group_scales, x))
        raise ValueError(
            f"linear_nvfp4: needs codes [N, K/2], group scales [N, K/{GROUP}] without minimums and rows [..., K]; "
            f"got {shapes}"
        )
    if not x.numel():
        return x.new_empty((*x.shape[:-1], n))
    rows = x.reshape(-1, k)
    rows = quantized(rows if rows.stride(-1) == 1 else rows.contiguous())
    weight = packed, arranged(group_scales), scales[:1].view(1)
    return product(rows, weight, None if bias is None else bias.to(x.dtype), x.dtype).view(*x.shape[:-1], n)
