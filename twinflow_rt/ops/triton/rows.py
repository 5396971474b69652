"""The Triton launchers of 8-bit networks as torch ops `twinflow::triton_*`; see triton_ops.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels import attention_fp8 as _attention
from ...kernels import linear, mlp, norm
from .plain import _op

Rows = tuple[Tensor, Tensor]


def _rows(x: Tensor, dtype: torch.dtype, width: int | None = None) -> Rows:
    """Values and scales for the rows of x."""
    shape = (*x.shape[:-1], x.shape[-1] if width is None else width)
    return x.new_empty(shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _quantizing(
    schema: str, launch: Callable[..., Any], width: Callable[[Tensor], int] = lambda x: x.shape[-1]
) -> Callable[..., Any]:
    """An op whose last argument is the dtype, and whose results are rows of `width(x)` elements."""
    return _op(f"{schema} -> (Tensor, Tensor)", launch, lambda x, *rest: _rows(x, rest[-1], width(x)))


def _closing(schema: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """The same with the residual stream before the rows."""
    fake = lambda x, *rest: (x.new_empty(x.shape), *_rows(x, rest[-1]))
    return _op(f"{schema} -> (Tensor, Tensor, Tensor)", launch, fake)


quantize_rows = _quantizing("triton_quantize_rows(Tensor x, ScalarType dtype)", linear.quantize_rows)
rms_norm_quantized = _quantizing(
    "triton_rms_norm_quantized(Tensor x, Tensor weight, float eps, ScalarType dtype)", norm.rms_norm_quantized
)
layer_norm_quantized = _quantizing(
    "triton_layer_norm_quantized(Tensor x, Tensor? weight, float eps, Tensor? bias, ScalarType dtype)",
    norm.layer_norm_quantized,
)
residual_norm_quantized = _closing(
    "triton_residual_norm_quantized(Tensor x, Tensor branch, Tensor post, Tensor pre, float eps, ScalarType dtype)",
    norm.residual_norm_quantized,
)
residual_layer_norm_quantized = _closing(
    "triton_residual_layer_norm_quantized(Tensor x, Tensor branch, Tensor? gate, Tensor? weight, Tensor? bias,"
    " float eps, ScalarType dtype)",
    norm.residual_layer_norm_quantized,
)
swiglu_quantized = _quantizing(
    "triton_swiglu_quantized(Tensor x, ScalarType dtype)", mlp.swiglu_quantized, lambda x: x.shape[-1] // 2
)
gelu_tanh_quantized = _quantizing("triton_gelu_tanh_quantized(Tensor x, ScalarType dtype)", mlp.gelu_tanh_quantized)
attention_fp8 = _op(
    "triton_attention_fp8(Tensor q, Tensor k, Tensor v, Tensor? lengths=None) -> Tensor",
    _attention.attention_fp8, lambda q, k, v, lengths=None: q.new_empty((*q.shape[:2], q.shape[2] * q.shape[3])),
)  # fmt: skip
