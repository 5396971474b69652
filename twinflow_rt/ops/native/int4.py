"""The products of ops/int4.py on a CPU. Rows of int8: where torch's int8 product is exact, which is where it is fast,
the weight is widened for it, elsewhere our kernel widens and multiplies. Plain rows meet a weight of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..linear import int8_sums, sums_int8
from .library import FORMATS
from .linear import dequantize, multiply, product_like
from .register import address, op, run

BLOCK = 1 << 27  # bytes of a weight that are widened at once: all of most layers', as parts must be put together
WEIGHT = "Tensor packed, Tensor group_scales, Tensor? group_minimums, Tensor scales"
Fields = Sequence[Any]  # of an `Int4Weight`


def _struct(weight: Fields, inputs: int, first: int = 0) -> tuple[Any, ...]:
    """twinflow_int4 of the rows from `first` on, and what keeps it alive. Raises ValueError for what is no weight."""
    n, groups, half = len(weight[0]), weight[1].shape[1], torch.float16
    shapes = (torch.uint8, inputs // 2), (half, groups), (half, groups), (torch.float32, 1)
    for t, (dtype, width) in zip(weight, shapes, strict=True):
        if t is not None and (t.dtype, *t.shape) != (dtype, n, width):
            raise ValueError(f"of a weight of 4 bits [{n}, {inputs}]: {t.dtype} {tuple(t.shape)}, not {dtype} {width}")
    held = [None if t is None else t[first:].contiguous() for t in weight]
    return *map(address, held), inputs // max(groups, 1), held


def _by_blocks(weight: Fields, inputs: int, dtype: torch.dtype, product: Callable[[Tensor, int], Tensor]) -> Tensor:
    """What `product` makes [rows, n] of blocks of the weight [n, inputs] and where they begin, side by side."""
    step, parts = max(BLOCK // (inputs * dtype.itemsize), 1), []
    block = torch.empty((min(step, len(weight[0])), inputs), dtype=dtype)
    for first in range(0, len(weight[0]), step):
        part = block[: len(weight[0]) - first]
        where = part.data_ptr(), FORMATS.get(dtype, 0), len(part), inputs
        run("widen_int4", weight[3], _struct(weight, inputs, first), *where)
        parts.append(product(part, first))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


@op(f"linear_w4a8(Tensor x, Tensor x_scales, {WEIGHT}, Tensor? bias, ScalarType dtype) -> Tensor", product_like)
def linear_w4a8(x: Tensor, x_scales: Tensor, *rest: Any) -> Tensor:
    """See ops/int4.py; the same numbers as `linear_quantized` of the widened weight."""
    *weight, bias, dtype = rest
    if not sums_int8():
        return multiply("linear_int4", x, x_scales, weight[0], [_struct(weight, x.shape[-1])], bias, dtype)

    def product(block: Tensor, first: int) -> Tensor:
        part = None if bias is None else bias[first : first + len(block)]
        return dequantize(int8_sums(x, block), x_scales, weight[3][first : first + len(block)], part, dtype)

    return _by_blocks(weight, x.shape[-1], torch.int8, product).view(*x.shape[:-1], len(weight[0]))


@op(f"linear_w4a16(Tensor x, {WEIGHT}, Tensor? bias) -> Tensor", lambda x, w, *_: x.new_empty((*x.shape[:-1], len(w))))
def linear_w4a16(x: Tensor, *rest: Any) -> Tensor:
    """See ops/int4.py."""
    *weight, bias = rest
    rows = x.reshape(-1, x.shape[-1]).float()
    y = _by_blocks(weight, x.shape[-1], torch.float32, lambda block, first: rows @ block.t())
    return (y if bias is None else y.add_(bias.float())).to(x.dtype).view(*x.shape[:-1], len(weight[0]))
