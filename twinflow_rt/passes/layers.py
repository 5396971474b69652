"""What a linear layer multiplies with, once its network is loaded: the kinds of layers, and how one replaces another.

    plain     torch's own `F.linear`
    packed    CPU: the weight in oneDNN's blocked layout, made once instead of in every call
    upcast    CPU without bfloat16 instructions: bfloat16 weights multiplied in float32
    int8      CPU: int8 weights with a scale per row, rows of activations quantized too
    fp8       NVIDIA GPUs from 8.9 on: the same with float8_e4m3fn; a CPU emulates it, slowly

A layer of another kind is another module, set on the parent in place of the old one (`replace_module`). It is still an
`nn.Linear` with a `weight` of its dtype, device and size; `state_dict` has the weight as it was loaded (packed), or
quantized, with its scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import OpTable
from ..ops.linear import LIMITS, QuantizedRows, int8_limit, linear_packed, linear_upcast, pack, quantize_weight
from ..ops.table import EAGER_QUANTIZED, QuantizedOps
from .convolutions import plain_convolutions
from .replace import replace_module, take_over

WEIGHT_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # kind of a quantized layer -> dtype of its weight
ACTIVATION_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # ... -> what its input is quantized to
SCALE = "weight_scale"  # beside a quantized weight


class ConvertedLinear(nn.Linear):
    """A linear layer made of another one, with its bias and a `weight` of another form."""

    def __init__(self, layer: nn.Linear, weight: Tensor) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta", dtype=torch.float32)
        take_over(self, layer, weight)


class PackedLinear(ConvertedLinear):
    """A linear layer whose weight is in oneDNN's layout."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer, pack(layer.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        return linear_packed(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.detach().to_dense()


class UpcastLinear(ConvertedLinear):
    """A linear layer that stores bfloat16 and multiplies float32."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer, layer.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return linear_upcast(x, self.weight, self.bias)


class QuantizedLinear(ConvertedLinear):
    """A linear layer with an int8 or float8_e4m3fn weight [N, K] and its float32 scales `weight_scale` [N, 1].

    Takes rows that are quantized already, or a tensor, whose rows it quantizes. It computes with the reference ops
    until `bind` gives it others. kind: "int8" or "fp8". The layer it is made of may be on the meta device.
    """

    weight_scale: nn.Parameter
    input_ops: OpTable  # absent before `bind`: see `ops.ops_for`

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        values, scales = quantized_values(dense_weight(layer), kind)
        super().__init__(layer, values)
        self.register_parameter(SCALE, nn.Parameter(scales, requires_grad=False))
        self.kind, self.activations, self.quantized_ops = kind, ACTIVATION_DTYPES[kind], EAGER_QUANTIZED

    def bind(self, quantized_ops: QuantizedOps, input_ops: OpTable) -> None:
        """Compute with `quantized_ops` from now on. input_ops: ops whose outputs are quantized for this layer, which
        `ops.ops_for` returns for it."""
        self.quantized_ops, self.input_ops = quantized_ops, input_ops

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        if not isinstance(x, QuantizedRows):
            x = QuantizedRows(*self.quantized_ops.quantize_rows(x, self.activations), x.dtype)
        multiply = self.quantized_ops.linear_quantized
        return multiply(x.values, x.scales, self.weight, self.weight_scale, self.bias, x.dtype)


def linear_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of `network` with their names."""
    return ((name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear))


def converted(layer: nn.Linear, kind: str) -> nn.Linear:
    """Return a layer of that kind made of `layer`, or `layer` itself where it is of that kind already."""
    if kind == "packed":
        return PackedLinear(layer)
    if kind == "upcast":
        return UpcastLinear(layer)
    if kind in WEIGHT_DTYPES and not isinstance(layer, QuantizedLinear):
        return QuantizedLinear(layer, kind)
    return layer


def dense_weight(layer: nn.Linear) -> Tensor:
    """Return the weight of a layer that is not quantized, in torch's own layout."""
    weight = layer.weight.detach()
    return weight.to_dense() if weight.is_mkldnn else weight


def quantized_values(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the values and scales that a QuantizedLinear of `kind` has on the device of `weight`."""
    limit = largest_int8(weight.device) if kind == "int8" else None
    return quantize_weight(weight, WEIGHT_DTYPES[kind], limit)


def largest_int8(device: torch.device) -> float:
    """Return the largest magnitude of int8 weights on `device`: a GPU sums products in 32 bits, some CPUs do not."""
    return LIMITS[torch.int8] if device.type == "cuda" else int8_limit(torch.cpu.get_capabilities())


def quantized_layers(layers: Mapping[str, nn.Linear], kind: str) -> dict[str, QuantizedLinear]:
    """Return quantized layers made of `layers`, under the same names."""
    return {name: QuantizedLinear(layer, kind) for name, layer in layers.items()}


def unpack(network: nn.Module) -> None:
    """Give packed layers and converted convolutions their plain weights back: for tracers, which cannot see into
    oneDNN's layout."""
    plain_convolutions(network)
    for name in [name for name, layer in linear_layers(network) if isinstance(layer, PackedLinear)]:
        layer = network.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=torch.float32)
        take_over(plain, layer, dense_weight(layer))
        replace_module(network, name, plain)
