"""The quantized linear layers of ops/linear.py by the kernels of csrc: activations as 8-bit values with a scale per
row, made in one pass, and their product: torch's and the way back from it, or, on CPUs without VNNI, our own.

What a norm or an activation quantizes (norm.py, mlp.py) is not rounded to the storage's dtype before, as in the
references. A GPU's kernels make int8 and float8, a CPU's int8: float8, which it emulates, is the references'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear import int8_sums, sums_int8
from . import library
from .register import Pair, address, kernels_of, op, quantized_like, results, rows_of, run


@op("quantize_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor)", quantized_like)
def quantize_rows(x: Tensor, dtype: torch.dtype) -> Pair:
    made: Pair
    (made, out), (rows, shape) = results(x, dtype), rows_of(x)
    run("quantize_rows", x, rows, out, shape)
    return made


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


def product_like(x: Tensor, x_scales: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """[..., N] in the dtype that is the last argument, for rows x [..., K] and a weight of N rows."""
    return x.new_empty((*x.shape[:-1], len(weight)), dtype=rest[-1])


@op(
    "linear_quantized(Tensor x, Tensor x_scales, Tensor weight, Tensor weight_scales, Tensor? bias, ScalarType dtype) "
    "-> Tensor",
    product_like,
)
def linear_quantized(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See ops/linear.py: int32 sums of torch's int8 product, scaled in one pass, or all in one kernel of csrc."""
    if sums_int8() or isinstance(kernels_of(x), library.CudaKernels):
        y = dequantize(int8_sums(x, weight), x_scales, weight_scales, bias, dtype)
        return y.view(*x.shape[:-1], len(weight))
    if weight.dtype != torch.int8 or weight_scales.shape != (len(weight), 1):
        raise ValueError(f"a weight of int8 has a scale per row: {weight.dtype}, {tuple(weight_scales.shape)}")
    held = weight.contiguous(), weight_scales.float().contiguous()
    return multiply("linear_int8", x, x_scales, weight, [t.data_ptr() for t in held], bias, dtype)


def multiply(
    kernel: str, x: Tensor, x_scales: Tensor, weight: Tensor, arguments: Any, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The CPU's product of rows of int8 with a weight [N, ...], which the kernel takes as `arguments`."""
    rows, columns, inputs = x_scales.numel(), len(weight), x.shape[-1]
    if x.dtype != torch.int8 or rows * inputs != x.numel() or (bias is not None and bias.shape != (columns,)):
        raise ValueError(f"rows of int8 have a scale each, a bias {columns} elements: {x.dtype}, {rows} scales")
    held, out = (x.contiguous(), x_scales.float().contiguous()), product_like(x, x_scales, weight, dtype)
    bias = None if bias is None else bias.to(dtype).contiguous()
    places = *(t.data_ptr() for t in held), *arguments, address(bias), out.data_ptr()
    run(kernel, out, *places, rows, columns, inputs)
    return out
