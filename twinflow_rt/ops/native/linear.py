"""The quantized linear layers of ops/linear.py by the kernels of csrc: activations as 8-bit values with a scale per
row, made in one pass, and the way back from torch's product of two such tensors.

What a norm or an activation quantizes (norm.py, mlp.py) is not rounded to the storage's dtype before, as in the
references. A GPU's kernels make int8 and float8, a CPU's int8: float8, which it emulates, is the references'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear import int8_sums
from .register import Pair, address, op, quantized_like, results, rows_of, run


@op("quantize_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor)", quantized_like)
def quantize_rows(x: Tensor, dtype: torch.dtype) -> Pair:
    made: Pair
    (made, out), (rows, shape) = results(x, dtype), rows_of(x)
    run("quantize_rows", x, rows, out, shape)
    return made


def _product(sums: Tensor, x_scales: Tensor, w_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return sums.new_empty(sums.shape, dtype=dtype)


@op(
    "dequantize(Tensor sums, Tensor x_scales, Tensor weight_scales, Tensor? bias, ScalarType dtype) -> Tensor",
    _product,
)
def dequantize(
    sums: Tensor, x_scales: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """sums * x_scales * weight_scales^T + bias in `dtype`, rounded once. sums: int32 [M, N]; x_scales: float32 of M
    elements; weight_scales: float32 of N; bias: [N] in `dtype` or None."""
    rows, columns = sums.shape
    if x_scales.numel() != rows or weight_scales.numel() != columns or (bias is not None and bias.shape != (columns,)):
        raise ValueError(f"a product {tuple(sums.shape)} takes a scale per row and column, and a bias per column")
    out = sums.new_empty(sums.shape, dtype=dtype)
    held = sums.contiguous(), x_scales.float().contiguous(), weight_scales.float().contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    run("dequantize", out, *(t.data_ptr() for t in held), address(bias), out.data_ptr(), rows, columns)
    return out


def linear_quantized(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See ops/linear.py: int32 sums of torch's int8 product, scaled in one pass."""
    y: Tensor = dequantize(int8_sums(x, weight), x_scales, weight_scales, bias, dtype)
    return y.view(*x.shape[:-1], len(weight))
