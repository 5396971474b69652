"""Products with weights of 4 bits, whose codes are widened in registers: to int8 for rows of int8, which the integer
tensor cores multiply (W4A8), or to the dtype of plain rows (W4A16).

A byte holds the codes of two inputs that are 32 apart (`ops.int4`), so one tile of bytes is two tiles of codes, each of
one group of inputs. The weight is the left factor, so tiles of the result are made transposed: on 9.0 the left factor
may come from registers, the right one comes from shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .register import torch_op

GROUPS = (32, 64, 128)  # inputs that share a scale
CHUNK = 64  # inputs whose codes are packed together: a step of the sum


@dataclass(frozen=True)
class Config:
    """Tile of `outputs` x `rows`, warps, and depth of the load pipeline."""

    outputs: int
    rows: int
    warps: int
    stages: int


def config(rows: int, arch: int) -> Config:
    """Tile for `rows` rows on compute capability `arch`: as many of them as fit, since every tile widens its weights.

    A warp has 16 outputs (a group of 4 warps 64 on 9.0) and all rows of the tile, so none widens what another does.
    """
    wide = 256 if arch == 90 else 128
    tile = min(max(launch.power_of_two(rows), 32), wide)
    if arch == 90 or tile == 32:
        return Config(64, tile, 4, 3 if tile == wide else 5)
    return Config(128, tile, 8, 3)


@triton.jit
def _widened(codes, scale, minimum, HIGH: tl.constexpr, dtype: tl.constexpr):
    """Codes [OUTPUTS, 32] in units of their rows' scales: int8, rounded to nearest even, or floats.

    codes: bytes as the upper mantissas of floats of 256 to 511; scale, minimum: [OUTPUTS, 1], the latter None where
    codes are around 8. Everything but the last rounding is exact.
    """
    step = scale / 16 if HIGH else scale
    code = (codes & (0x43F80000 if HIGH else 0x43878000)).to(tl.float32, bitcast=True)  # 256 + step * code
    units = code * step - scale * (24 if HIGH else 264) if minimum is None else (code - 256) * step - minimum
    if dtype == tl.int8:
        # 1.5 * 2^23: at that size a float32 has no fraction, so the addition rounds, and its last byte is the integer
        return (units + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    return units.to(dtype)


@triton.jit
def _column(values, at):
    return tl.load(values + at).to(tl.float32)[:, None]


@triton.jit
def _linear(
    x, x_scales, packed, group_scales, group_minimums, scales, bias, out, count, outputs, inner, x_row,
    GROUP: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share 8 row tiles, so that weights are read from L2 and not from memory
    down, across = (count + ROWS - 1) // ROWS, (outputs + OUTPUTS - 1) // OUTPUTS
    band = tl.program_id(0) // (8 * across)
    height = tl.minimum(down - band * 8, 8)
    within = tl.program_id(0) % (8 * across)
    row = (band * 8 + within % height) * ROWS + tl.arange(0, ROWS)
    col = (within // height) * OUTPUTS + tl.arange(0, OUTPUTS)
    # rows and outputs past the end wrap around: in bounds, and never stored
    r, n = (row % count).to(tl.int64), (col % outputs).to(tl.int64)
    byte = tl.arange(0, 32)
    a = x + r[None, :] * x_row + byte[:, None]
    w = packed + n[:, None] * (inner // 2) + byte[None, :]
    of_groups = n * (inner // GROUP)
    dtype: tl.constexpr = x.dtype.element_ty
    sums: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    acc = tl.full([OUTPUTS, ROWS], 0, sums)
    for at in tl.range(0, inner, 64):
        codes = (tl.load(w).to(tl.int32) << 15) | 0x43800000
        group = of_groups + at // GROUP
        scale = _column(group_scales, group)
        minimum = None if group_minimums is None else _column(group_minimums, group)
        acc = tl.dot(_widened(codes, scale, minimum, False, dtype), tl.load(a), acc, out_dtype=sums)
        if GROUP == 32:
            scale = _column(group_scales, group + 1)
            minimum = None if group_minimums is None else _column(group_minimums, group + 1)
        acc = tl.dot(_widened(codes, scale, minimum, True, dtype), tl.load(a + 32), acc, out_dtype=sums)
        a += 64
        w += 32
    y = acc.to(tl.float32)
    if x_scales is not None:
        y *= tl.load(x_scales + r)[None, :]
    y *= _column(scales, n)
    if bias is not None:
        y += _column(bias, n)
    target = out + row.to(tl.int64)[None, :] * outputs + col[:, None]
    tl.store(target, y.to(out.dtype.element_ty), (row[None, :] < count) & (col[:, None] < outputs))


def _check(where: str, x: Tensor, weight: tuple[Tensor | None, ...], bias: Tensor | None) -> int:
    """The inputs of a group; raises ValueError for tensors that do not fit each other."""
    packed, group_scales, group_minimums, scales = weight
    (n, half), k = packed.shape, x.shape[-1]
    group = k // max(group_scales.shape[-1], 1)
    if k != 2 * half or k % CHUNK or group not in GROUPS or group_scales.shape != (n, k // group):
        shapes = ", ".join(str(tuple(t.shape)) for t in (packed, group_scales, x))
        raise ValueError(
            f"{where}: needs codes [N, K/2], group scales [N, K/G] and rows [..., K] with K a multiple of {CHUNK}, "
            f"G one of {', '.join(map(str, GROUPS))}; got {shapes}"
        )
    for name, tensor, shape, dtype in (
        ("codes", packed, (n, half), torch.uint8), ("group scales", group_scales, (n, k // group), torch.float16),
        ("group minimums", group_minimums, (n, k // group), torch.float16), ("scales", scales, (n, 1), torch.float32),
        ("bias", bias, (n,), None),
    ):  # fmt: skip
        if tensor is None:
            continue
        if tensor.shape != shape or dtype not in (None, tensor.dtype) or not tensor.is_contiguous():
            raise ValueError(
                f"{where}: {name} are contiguous {list(shape)}{f', {dtype}' if dtype else ''}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    return group


def _launch(
    where: str, x: Tensor, x_scales: Tensor | None, weight: tuple[Tensor | None, ...], bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    group, outputs, inner = _check(where, x, weight, bias), weight[0].shape[0], x.shape[-1]
    out = torch.empty(*x.shape[:-1], outputs, dtype=dtype, device=x.device)
    launch.require_floats(where, out)
    if not out.numel():
        return out
    x = x.reshape(-1, inner)
    x = x if x.stride(-1) == 1 else x.contiguous()
    c = config(x.shape[0], launch.arch(x))
    with torch.cuda.device_of(x):
        _linear[(launch.ceil_div(x.shape[0], c.rows) * launch.ceil_div(outputs, c.outputs),)](
            x, x_scales, *weight, bias, out, x.shape[0], outputs, inner, x.stride(0), group, c.outputs, c.rows,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return out


_WEIGHT = "Tensor packed, Tensor group_scales, Tensor? group_minimums, Tensor scales, Tensor? bias"


@torch_op(
    f"linear_w4a8(Tensor x, Tensor x_scales, {_WEIGHT}, ScalarType dtype) -> Tensor",
    lambda x, _, packed, *rest: x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=rest[-1]),
)
def linear_w4a8(
    x: Tensor, x_scales: Tensor, packed: Tensor, group_scales: Tensor, group_minimums: Tensor | None, scales: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`ops.linear_w4a8` on the GPU: x int8 [..., K], any row strides, and float32 scales [..., 1]; the weight's fields
    and the bias contiguous. The products are those of int8 tensor cores, so sums are exact."""
    if x.dtype != torch.int8 or x_scales.dtype != torch.float32 or x_scales.shape != (*x.shape[:-1], 1):
        given = f"{x.dtype} {list(x.shape)} and {x_scales.dtype} {list(x_scales.shape)}"
        raise ValueError(f"linear_w4a8: needs int8 rows [..., K] and float32 scales [..., 1], got {given}")
    weight = (packed, group_scales, group_minimums, scales)
    return _launch("linear_w4a8", x, x_scales.contiguous(), weight, bias, dtype)


@torch_op(
    f"linear_w4a16(Tensor x, {_WEIGHT}) -> Tensor",
    lambda x, packed, *_: x.new_empty((*x.shape[:-1], packed.shape[0])),
)
def linear_w4a16(
    x: Tensor, packed: Tensor, group_scales: Tensor, group_minimums: Tensor | None, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """`ops.linear_w4a16` on the GPU: x [..., K], bfloat16 or float16, any row strides. Weights in units of their rows'
    scales are rounded to x's dtype for the tensor cores; sums are float32."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"linear_w4a16: needs bfloat16 or float16, got {x.dtype}")
    return _launch("linear_w4a16", x, None, (packed, group_scales, group_minimums, scales), bias, x.dtype)
