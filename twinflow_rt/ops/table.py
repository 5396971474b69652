"""The op tables of a network: what it calls, and what its quantized layers call.

A norm or an activation that feeds a quantized layer writes what that layer multiplies, 8-bit values and a
scale per row, so that no pass over memory is spent on quantizing. Networks say which layer comes next:

    x, h = ops_for(self.w13, ops).residual_norm(x, branch, post, pre, eps)

which is `ops.residual_norm` itself where `w13` is not quantized; else h are `QuantizedRows`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionOps
from .conv import ConvOps
from .decode import DecodeOps
from .int4 import Int4Ops
from .linear import QuantizedLinearOps, QuantizedRows
from .mlp import MlpOps, QuantizedMlpOps
from .norm import NormOps, QuantizedNormOps
from .nvfp4 import Nvfp4Ops
from .rope import RopeOps
from .sample import SampleOps


@dataclass(frozen=True)
class OpTable(ConvOps, DecodeOps, SampleOps, MlpOps, AttentionOps, RopeOps, NormOps):
    """The callables a compiled network runs on; the signatures are those of the eager references, the defaults."""


@dataclass(frozen=True)
class QuantizedOps(QuantizedMlpOps, QuantizedNormOps, QuantizedLinearOps, Int4Ops, Nvfp4Ops):
    """The callables of a network's quantized layers and of what feeds them; by default the eager references."""


EAGER = OpTable()
EAGER_QUANTIZED = QuantizedOps()


def ops_for(layer: nn.Module | None, ops: OpTable) -> OpTable:
    """Ops whose outputs are already quantized if `layer` is quantized, else `ops`."""
    # beside __dict__ a module looks for parameters, buffers and modules of that name, as slowly as a small kernel runs
    return ops if layer is None else layer.__dict__.get("input_ops", ops)


def quantizing(ops: OpTable, quantized: QuantizedOps, to: torch.dtype) -> OpTable:
    """`ops` with norms and activations that return `QuantizedRows` of dtype `to` in place of tensors.

    The residual stream, which two of them return beside the normalised rows, stays a tensor.
    """

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> QuantizedRows:
        return QuantizedRows(*quantized.rms_norm_quantized(x, weight, eps, to), x.dtype)

    def layer_norm(x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None = None) -> QuantizedRows:
        return QuantizedRows(*quantized.layer_norm_quantized(x, weight, eps, bias, to), x.dtype)

    def residual_norm(x: Tensor, branch: Tensor, post: Tensor, pre: Tensor, eps: float) -> tuple[Tensor, QuantizedRows]:
        total, values, scales = quantized.residual_norm_quantized(x, branch, post, pre, eps, to)
        return total, QuantizedRows(values, scales, x.dtype)

    def residual_layer_norm(
        x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, QuantizedRows]:
        total, values, scales = quantized.residual_layer_norm_quantized(x, branch, gate, weight, bias, eps, to)
        return total, QuantizedRows(values, scales, x.dtype)

    return replace(
        ops, rms_norm=rms_norm, layer_norm=layer_norm, residual_norm=residual_norm,
        residual_layer_norm=residual_layer_norm,
        swiglu=lambda x: QuantizedRows(*quantized.swiglu_quantized(x, to), x.dtype),
        gelu_tanh=lambda x: QuantizedRows(*quantized.gelu_tanh_quantized(x, to), x.dtype),
        linear_swiglu=lambda x, w: QuantizedRows(*quantized.swiglu_quantized(F.linear(x, w), to), x.dtype),
        linear_gelu=lambda x, w, b: QuantizedRows(*quantized.gelu_tanh_quantized(F.linear(x, w, b), to), x.dtype),
    )  # fmt: skip
