"""What a linear layer multiplies with, once its network is loaded: the kinds of layers, and how one becomes another.

    plain     torch's own `F.linear`
    packed    CPU: the weight in oneDNN's blocked layout, made once instead of in every call
    upcast    CPU without bfloat16 instructions: bfloat16 weights multiplied in float32
    int8      CPU: int8 weights with a scale per row, rows of activations quantized too
    fp8       NVIDIA GPUs from 8.9 on: the same with float8_e4m3fn; a CPU emulates it, slowly

Modules are exchanged in place. A packed or quantized layer is still an `nn.Linear` with a `weight` of
its dtype, device and size; `state_dict` has it as it was loaded (packed), or quantized, with its scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear import LIMITS, QuantizedRows, int8_limit, linear_packed, linear_upcast, pack, quantize_weight
from ..ops.table import EAGER_QUANTIZED, QuantizedOps
from .convolutions import plain_convolutions

ROWS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # precision -> what its layers multiply
SCALE = "weight_scale"  # beside a quantized weight


class PackedLinear(nn.Linear):
    """A linear layer whose weight is in oneDNN's layout."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_packed(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.detach().to_dense()


class UpcastLinear(nn.Linear):
    """A linear layer that stores bfloat16 and multiplies float32."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_upcast(x, self.weight, self.bias)


class QuantizedLinear(nn.Linear):
    """A linear layer with an int8 or float8_e4m3fn weight [N, K] and its float32 scales `weight_scale` [N, 1].

    Takes rows that are quantized already, or a tensor, whose rows it quantizes. `attach` gives it the
    implementations of its machine in place of the reference ones, and `input_ops` for `ops.ops_for`.
    """

    quantized_ops: QuantizedOps = EAGER_QUANTIZED
    weight_scale: nn.Parameter

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        if not isinstance(x, QuantizedRows):
            x = QuantizedRows(*self.quantized_ops.quantize_rows(x, self.weight.dtype), x.dtype)
        multiply = self.quantized_ops.linear_quantized
        return multiply(x.values, x.scales, self.weight, self.weight_scale, self.bias, x.dtype)


def linear_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear))


def exchange(layer: nn.Linear, kind: str) -> None:
    if kind == "packed":
        layer.__class__, weight = PackedLinear, pack(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
    elif kind == "upcast":
        layer.__class__ = UpcastLinear
    elif kind in ROWS and not isinstance(layer, QuantizedLinear):
        quantize_layer(layer, layer.weight.detach(), ROWS[kind])


def quantize_layer(layer: nn.Linear, weight: Tensor, to: torch.dtype) -> None:
    """Makes `layer` a QuantizedLinear of `weight`, which may be on the meta device."""
    become(layer, *quantized_values(weight, to))


def quantized_values(weight: Tensor, to: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and scales that a QuantizedLinear may have where `weight` is."""
    return quantize_weight(weight, to, largest_int8(weight.device) if to == torch.int8 else None)


def largest_int8(device: torch.device) -> float:
    """Of the magnitudes that int8 weights may have on `device`: a GPU sums products in 32 bits, some CPUs do not."""
    return LIMITS[torch.int8] if device.type == "cuda" else int8_limit(torch.cpu.get_capabilities())


def become(layer: nn.Linear, values: Tensor, scales: Tensor) -> None:
    layer.__class__ = QuantizedLinear
    layer.weight = nn.Parameter(values, requires_grad=False)
    layer.register_parameter(SCALE, nn.Parameter(scales, requires_grad=False))


class Trial:
    """These layers in `precision` for as long as it is entered, as often as it is; both forms are held throughout.

        with Trial(layers, "fp8"):
            network(...)
    """

    def __init__(self, layers: Sequence[nn.Linear], precision: str) -> None:
        self._kept = [(layer, type(layer), layer.weight) for layer in layers]
        weights = (layer.weight.detach() for layer in layers)
        plain = (weight.to_dense() if weight.is_mkldnn else weight for weight in weights)
        self._quantized = [quantized_values(weight, ROWS[precision]) for weight in plain]

    def __enter__(self) -> None:
        for (layer, *_), form in zip(self._kept, self._quantized, strict=True):
            become(layer, *form)

    def __exit__(self, *_: object) -> None:
        for layer, kind, weight in self._kept:
            layer.__class__, layer.weight = kind, weight
            del layer._parameters[SCALE]
            for name in ("quantized_ops", "input_ops"):  # of `attach`
                layer.__dict__.pop(name, None)


def unpack(network: nn.Module) -> None:
    """Gives packed layers and converted convolutions their plain weights back: for tracers, which cannot see into
    oneDNN's layout."""
    plain_convolutions(network)
    for _, layer in list(linear_layers(network)):
        if isinstance(layer, PackedLinear):
            plain: Any = layer
            plain.__class__, weight = nn.Linear, layer.weight.detach().to_dense()
            plain.weight = nn.Parameter(weight, requires_grad=False)
