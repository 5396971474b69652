"""Linear layers with what follows them, in one op where the table has one.

A layer that was packed or quantized (`passes.quantize`) multiplies in a way of its own, so what follows it
is an op of its own, too.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import OpTable


def _plain(layer: nn.Linear) -> bool:
    return type(layer) is nn.Linear


def with_swiglu(layer: nn.Linear, x: Tensor, ops: OpTable) -> Tensor:
    """`ops.swiglu` of layer(x), a merged w1|w3 projection without bias."""
    return ops.linear_swiglu(x, layer.weight) if _plain(layer) else ops.swiglu(layer(x))


def with_gelu(layer: nn.Linear, x: Tensor, ops: OpTable) -> Tensor:
    """`ops.gelu_tanh` of layer(x), a projection with bias."""
    return ops.linear_gelu(x, layer.weight, layer.bias) if _plain(layer) else ops.gelu_tanh(layer(x))


def with_residual(residual: Tensor, layer: nn.Linear, x: Tensor, ops: OpTable) -> Tensor:
    """residual + layer(x), of a projection without bias. The residual stream may be wider than the layer."""
    if _plain(layer) and residual.dtype == x.dtype == (weight := layer.weight).dtype:
        return ops.linear_residual(residual, x, weight)
    return residual + layer(x)
