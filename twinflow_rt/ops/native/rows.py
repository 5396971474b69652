"""Quantized rows: 8-bit values and scales in the one pass of the native norm or activation that makes them, and the
way back from the product. One rounding, as the references have it: what a norm of bfloat16 rows gives is not rounded
in between.

A GPU's kernels make int8 and float8, a CPU's int8: float8 rows, which it emulates, are the references'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear import int8_sums
from . import library
from .register import as_rows, fake, fresh, halves, kernels_of, op, run, same, weight_of

Rows = tuple[Tensor, Tensor]


def _made(x: Tensor, dtype: torch.dtype, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Room for the values and scales of x's rows, or of others of `width`."""
    if dtype not in library.FORMATS:
        raise TypeError(f"rows are int8 or float8_e4m3fn, not {dtype}")
    values = x.new_empty((*x.shape[:-1], x.shape[-1] if width is None else width), dtype=dtype)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _quantize(name: str, x: Tensor, dtype: torch.dtype, *arguments: Any) -> None:
    """`run` of a kernel that makes rows of `dtype`: a GPU's are told which, a CPU's make int8."""
    if isinstance(kernels_of(x), library.CudaKernels):
        arguments = (*arguments, library.FORMATS[dtype])
    elif dtype != torch.int8:
        raise TypeError(f"native rows of a CPU are int8, not {dtype}")
    run(name, x, *arguments)


@op("quantize_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor)")
def quantize_rows(x: Tensor, dtype: torch.dtype) -> Rows:
    """See ops/linear.py."""
    values, scales = _made(x, dtype)
    rows, *strides = as_rows(x)
    _quantize("quantize_rows", x, dtype, rows.data_ptr(), *strides, values.data_ptr(), scales.data_ptr(), *rows.shape)
    return values, scales


@op("rms_norm_quantized(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)")
def rms_norm_quantized(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Rows:
    """See ops/norm.py."""
    values, scales = _made(x, dtype)
    rows, *strides = as_rows(x)
    _held, *w = weight_of(weight, x)
    made = values.data_ptr(), scales.data_ptr()
    _quantize("rms_norm_quantized", x, dtype, rows.data_ptr(), *strides, *w, *made, *rows.shape, eps)
    return values, scales


@op("layer_norm_quantized(Tensor x, Tensor? weight, float eps, Tensor? bias, ScalarType dtype) -> (Tensor, Tensor)")
def layer_norm_quantized(
    x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None, dtype: torch.dtype
) -> Rows:  # fmt: skip
    """See ops/norm.py."""
    values, scales = _made(x, dtype)
    rows, *strides = as_rows(x)
    (_held, *w), (_too, *b) = weight_of(weight, x), weight_of(bias, x)
    made = values.data_ptr(), scales.data_ptr()
    _quantize("layer_norm_quantized", x, dtype, rows.data_ptr(), *strides, *w, *b, *made, *rows.shape, eps)
    return values, scales


@op(
    "residual_norm_quantized(Tensor x, Tensor branch, Tensor post, Tensor pre, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)"
)
def residual_norm_quantized(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops/norm.py."""
    same("branch", x, branch)
    total, (values, scales) = fresh(x), _made(x, dtype)
    (a, *a_strides), (b, *b_strides) = as_rows(x), as_rows(branch)
    (_held, *after), (_too, *before) = weight_of(post, x), weight_of(pre, x)
    _quantize(
        "residual_norm_quantized", x, dtype, a.data_ptr(), *a_strides, b.data_ptr(), *b_strides, *after, *before,
        total.data_ptr(), values.data_ptr(), scales.data_ptr(), *a.shape, eps,
    )  # fmt: skip
    return total, values, scales


@op(
    "residual_layer_norm_quantized(Tensor x, Tensor branch, Tensor? gate, Tensor? weight, Tensor? bias, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
def residual_layer_norm_quantized(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ops/norm.py."""
    same("branch", x, branch)
    total, (values, scales) = fresh(x), _made(x, dtype)
    (a, *a_strides), (b, *b_strides) = as_rows(x), as_rows(branch)
    kept = [weight_of(w, x) for w in (gate, weight, bias)]
    _quantize(
        "residual_layer_norm_quantized", x, dtype, a.data_ptr(), *a_strides, b.data_ptr(), *b_strides,
        *(place for _, *one in kept for place in one), total.data_ptr(), values.data_ptr(), scales.data_ptr(),
        *a.shape, eps,
    )  # fmt: skip
    return total, values, scales


@op("swiglu_quantized(Tensor x, ScalarType dtype) -> (Tensor, Tensor)")
def swiglu_quantized(x: Tensor, dtype: torch.dtype) -> Rows:
    """See ops/mlp.py."""
    x, hidden = halves(x)
    values, scales = _made(x, dtype, hidden)
    _quantize("swiglu_quantized", x, dtype, x.data_ptr(), values.data_ptr(), scales.data_ptr(), scales.numel(), hidden)
    return values, scales


@op("gelu_tanh_quantized(Tensor x, ScalarType dtype) -> (Tensor, Tensor)")
def gelu_tanh_quantized(x: Tensor, dtype: torch.dtype) -> Rows:
    """See ops/mlp.py."""
    x, (values, scales) = x.contiguous(), _made(x, dtype)
    made = values.data_ptr(), scales.data_ptr()
    _quantize("gelu_tanh_quantized", x, dtype, x.data_ptr(), *made, scales.numel(), x.shape[-1])
    return values, scales


@op("dequantize(Tensor sums, Tensor x_scales, Tensor weight_scales, Tensor? bias, ScalarType dtype) -> Tensor")
def dequantize(
    sums: Tensor, x_scales: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """sums * x_scales * weight_scales^T + bias in `dtype`, rounded once. sums: int32 [M, N]; x_scales: float32 of M
    elements; weight_scales: float32 of N; bias: [N] in `dtype` or None."""
    rows, columns = sums.shape
    if x_scales.numel() != rows or weight_scales.numel() != columns or (bias is not None and bias.shape != (columns,)):
        raise ValueError(f"a product {tuple(sums.shape)} takes a scale per row and column, and a bias per column")
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    out = sums.new_empty(sums.shape, dtype=dtype)
    held = sums.contiguous(), x_scales.float().contiguous(), weight_scales.float().contiguous()
    last = None if bias is None else bias.contiguous()
    places = [t.data_ptr() for t in held] + [0 if last is None else last.data_ptr()]
    run("dequantize", out, *places, out.data_ptr(), rows, columns)
    return out


def linear_quantized(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See ops/linear.py: int32 sums of torch's int8 product, scaled in one pass."""
    y: Tensor = dequantize(int8_sums(x, weight), x_scales, weight_scales, bias, dtype)
    return y.view(*x.shape[:-1], len(weight))


# -- what torch.compile must know of the results ------------------------------------------------------------


@fake("quantize_rows", "rms_norm_quantized", "layer_norm_quantized", "gelu_tanh_quantized")
def _rows_like(x: Tensor, *rest: Any) -> Rows:
    return _made(x, rest[-1])


@fake("residual_norm_quantized", "residual_layer_norm_quantized")
def _sum_and_rows_like(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_made(x, rest[-1])


@fake("swiglu_quantized")
def _half_rows(x: Tensor, dtype: torch.dtype) -> Rows:
    return _made(x, dtype, x.shape[-1] // 2)


@fake("dequantize")
def _product(sums: Tensor, x_scales: Tensor, w_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return sums.new_empty(sums.shape, dtype=dtype)
