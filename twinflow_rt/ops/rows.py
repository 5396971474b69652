"""Quantized rows: activations of int8 and fp8 networks, from the op that makes them to the layer that reads them.

A norm or an activation that feeds a quantized layer writes what that layer multiplies, 8-bit values and a
scale per row, so that no pass over memory is spent on quantizing. Networks say who reads:

    x, h = into(self.w13, ops).residual_norm(x, branch, post, pre, eps)

which is `ops.residual_norm` itself where `w13` is not quantized; else h are `QuantizedRows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import linear_quantized, quantize_rows
from .mlp import gelu_tanh_quantized, swiglu_quantized
from .norm import layer_norm_quantized, residual_layer_norm_quantized, residual_norm_quantized, rms_norm_quantized
from .table import OpTable


class QuantizedRows(NamedTuple):
    """About values * scales. values: int8 or float8_e4m3fn [..., D]; scales: float32 [..., 1]; dtype: the storage
    dtype of the network, which a product of these rows is rounded to."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class RowTable:
    """The callables of quantized networks; the signatures are those of the eager references."""

    quantize_rows: Callable[..., tuple[Tensor, Tensor]]
    linear_quantized: Callable[..., Tensor]
    rms_norm_quantized: Callable[..., tuple[Tensor, Tensor]]
    layer_norm_quantized: Callable[..., tuple[Tensor, Tensor]]
    residual_norm_quantized: Callable[..., tuple[Tensor, Tensor, Tensor]]
    residual_layer_norm_quantized: Callable[..., tuple[Tensor, Tensor, Tensor]]
    swiglu_quantized: Callable[..., tuple[Tensor, Tensor]]
    gelu_tanh_quantized: Callable[..., tuple[Tensor, Tensor]]


EAGER_ROWS = RowTable(
    quantize_rows=quantize_rows,
    linear_quantized=linear_quantized,
    rms_norm_quantized=rms_norm_quantized,
    layer_norm_quantized=layer_norm_quantized,
    residual_norm_quantized=residual_norm_quantized,
    residual_layer_norm_quantized=residual_layer_norm_quantized,
    swiglu_quantized=swiglu_quantized,
    gelu_tanh_quantized=gelu_tanh_quantized,
)


def into(reader: nn.Module | None, ops: OpTable) -> OpTable:
    """The table whose norms and activations return what `reader` multiplies: `ops`, or, for a quantized layer,
    the one that `producing` made of it."""
    # beside __dict__ a module looks for parameters, buffers and modules of that name, as slowly as a small kernel runs
    return ops if reader is None else reader.__dict__.get("producers", ops)


def producing(ops: OpTable, rows: RowTable, to: torch.dtype) -> OpTable:
    """`ops` with norms and activations that return `QuantizedRows` of dtype `to` in place of tensors.

    The residual stream, which two of them return beside the normalised rows, stays a tensor.
    """

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> QuantizedRows:
        return QuantizedRows(*rows.rms_norm_quantized(x, weight, eps, to), x.dtype)

    def layer_norm(x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None = None) -> QuantizedRows:
        return QuantizedRows(*rows.layer_norm_quantized(x, weight, eps, bias, to), x.dtype)

    def residual_norm(
        x: Tensor, branch: Tensor, post: Tensor, pre: Tensor, eps: float
    ) -> tuple[Tensor, QuantizedRows]:
        total, values, scales = rows.residual_norm_quantized(x, branch, post, pre, eps, to)
        return total, QuantizedRows(values, scales, x.dtype)

    def residual_layer_norm(
        x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, QuantizedRows]:
        total, values, scales = rows.residual_layer_norm_quantized(x, branch, gate, weight, bias, eps, to)
        return total, QuantizedRows(values, scales, x.dtype)

    return replace(
        ops, rms_norm=rms_norm, layer_norm=layer_norm, residual_norm=residual_norm,
        residual_layer_norm=residual_layer_norm,
        swiglu=lambda x: QuantizedRows(*rows.swiglu_quantized(x, to), x.dtype),
        gelu_tanh=lambda x: QuantizedRows(*rows.gelu_tanh_quantized(x, to), x.dtype),
        linear_swiglu=lambda x, w: QuantizedRows(*rows.swiglu_quantized(F.linear(x, w), to), x.dtype),
        linear_gelu=lambda x, w, b: QuantizedRows(*rows.gelu_tanh_quantized(F.linear(x, w, b), to), x.dtype),
    )  # fmt: skip
