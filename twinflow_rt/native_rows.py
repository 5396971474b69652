"""Quantized rows on a CPU: the native norm or activation in float32, then `quantize_rows` (ops/rows.py).

One rounding, as the references have it: what a norm of bfloat16 rows gives is not rounded in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .ops.linear import quantize_rows

Rows = tuple[Tensor, Tensor]


def rms_norm_quantized(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Rows:
    """See ops/norm.py."""
    return quantize_rows(native.rms_norm(x.float(), weight, eps), dtype)


def layer_norm_quantized(
    x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None, dtype: torch.dtype
) -> Rows:  # fmt: skip
    """See ops/norm.py."""
    return quantize_rows(native.layer_norm(x.float(), weight, eps, bias), dtype)


def residual_norm_quantized(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops/norm.py."""
    if x.dtype == torch.float32:
        total, h = native.residual_norm(x, branch, post, pre, eps)
        assert h is not None  # of `pre`
        return total, *quantize_rows(h, dtype)
    total, _ = native.residual_norm(x, branch, post, None, eps)
    return total, *rms_norm_quantized(total, pre, eps, dtype)


def residual_layer_norm_quantized(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ops/norm.py."""
    total, h = native.residual_layer_norm(x, branch, gate, weight, bias, eps)
    if x.dtype == torch.float32:
        return total, *quantize_rows(h, dtype)
    return total, *layer_norm_quantized(total, weight, eps, bias, dtype)


def swiglu_quantized(x: Tensor, dtype: torch.dtype) -> Rows:
    """See ops/mlp.py."""
    return quantize_rows(native.swiglu(x.float()), dtype)


def gelu_tanh_quantized(x: Tensor, dtype: torch.dtype) -> Rows:
    """See ops/mlp.py."""
    return quantize_rows(native.gelu_tanh(x.float()), dtype)
