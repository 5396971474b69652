"""What a linear layer multiplies with, once its network is loaded: the kinds of layers, and how one replaces another.

    plain     torch's own `F.linear`
    packed    CPU: the weight in oneDNN's blocked layout, made once instead of in every call
    upcast    CPU without bfloat16 instructions: bfloat16 weights multiplied in float32
    int8      CPU: int8 weights with a scale per row, rows of activations quantized too
    fp8       NVIDIA GPUs from 8.9 on: the same with float8_e4m3fn; a CPU emulates it, slowly
    int4      weights of 4 bits in groups (`ops.int4`), rows of activations in int8 (W4A8)
    w4a16     the same weights, rows of activations as they are: as exact as the weights
    nvfp4     NVIDIA GPUs of 12.0: floats of 4 bits, weights and rows of activations (`ops.nvfp4`)

A layer of another kind is another module, set on the parent in place of the old one (`replace_module`). It is still an
`nn.Linear` with a `weight`, whose size is `in_features` and `out_features` (of 4 bits, two are in a byte); `state_dict`
has the weight as it was loaded (packed), or quantized, with its scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import OpTable, nvfp4
from ..ops.int4 import Int4Form, Int4Weight, dense, quantize_int4
from ..ops.linear import QuantizedRows, linear_packed, linear_upcast, pack, quantize_rows
from ..ops.table import EAGER_QUANTIZED, QuantizedOps
from .convolutions import plain_convolutions
from .replace import replace_module, take_over


class Kind(NamedTuple):
    """What a quantized layer is made of. weight: dtype of its `weight`; rows: what its input is quantized to, None
    where it is taken as it is; product: the op that multiplies the two."""

    weight: torch.dtype
    rows: torch.dtype | None
    product: str

    @property
    def in_groups(self) -> bool:
        """Whether weights have 4 bits, and scales in groups (`ops.int4`)."""
        return self.weight == torch.uint8 and self.product != "linear_nvfp4"


KINDS = {
    "int8": Kind(torch.int8, torch.int8, "linear_quantized"),
    "fp8": Kind(torch.float8_e4m3fn, torch.float8_e4m3fn, "linear_quantized"),
    "int4": Kind(torch.uint8, torch.int8, "linear_w4a8"),
    "w4a16": Kind(torch.uint8, None, "linear_w4a16"),
    "nvfp4": Kind(torch.uint8, None, "linear_nvfp4"),
}
GROUP = Int4Form(64)  # of weights that get their 4 bits here
# beside a quantized weight: a scale per row, and where it has 4 bits what its groups have
SCALE, GROUP_SCALE, GROUP_MINIMUM = BESIDE = ("weight_scale", "weight_group_scale", "weight_group_minimum")
INT4_LEAVES = ("weight", GROUP_SCALE, GROUP_MINIMUM, SCALE)  # in the order of `Int4Weight`


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
    """A linear layer with a weight of 8 bits [N, K] and its float32 scales `weight_scale` [N, 1], or one of 4 bits, see
    `ops.int4.Int4Weight`.

    Takes rows that are quantized already, or a tensor, whose rows it quantizes where its kind says so. It computes with
    the reference ops until `bind` gives it others. kind: of `KINDS`. values: what `quantized_values` returns; None: of
    `layer`, which may be on the meta device. origin: where values of 4 bits are from, in words.
    """

    weight_scale: nn.Parameter
    input_ops: OpTable  # absent before `bind`, and where rows are taken as they are: see `ops.ops_for`

    def __init__(
        self, layer: nn.Linear, kind: str, values: Mapping[str, Tensor] | None = None, origin: str = ""
    ) -> None:
        values = quantized_values(dense_weight(layer), kind) if values is None else values
        super().__init__(layer, values["weight"])
        for leaf in BESIDE:
            self.register_parameter(leaf, None if (v := values.get(leaf)) is None else nn.Parameter(v, False))
        self.kind, self.activations, self.origin, self.quantized_ops = kind, KINDS[kind].rows, origin, EAGER_QUANTIZED

    def bind(self, quantized_ops: QuantizedOps, input_ops: OpTable) -> None:
        """Compute with `quantized_ops` from now on. input_ops: ops whose outputs are quantized for this layer, which
        `ops.ops_for` returns for it."""
        self.quantized_ops = quantized_ops
        if self.activations is not None:
            self.input_ops = input_ops

    @property
    def int4(self) -> Int4Weight:
        """The weight of a layer that has 4 bits."""
        return Int4Weight(*(getattr(self, leaf) for leaf in INT4_LEAVES))

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        ops = self.quantized_ops
        if self.activations is None:
            assert isinstance(x, Tensor)
            product: Callable[..., Tensor] = getattr(ops, KINDS[self.kind].product)
            return product(x, *self.int4, self.bias)
        if not isinstance(x, QuantizedRows):
            x = QuantizedRows(*ops.quantize_rows(x, self.activations), x.dtype)
        if KINDS[self.kind].in_groups:
            return ops.linear_w4a8(x.values, x.scales, *self.int4, self.bias, x.dtype)
        return ops.linear_quantized(x.values, x.scales, self.weight, self.weight_scale, self.bias, x.dtype)


def linear_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of `network` with their names."""
    return ((name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear))


def converted(layer: nn.Linear, kind: str) -> nn.Linear:
    """Return a layer of that kind made of `layer`, or `layer` itself where it is of that kind already."""
    if kind == "packed":
        return PackedLinear(layer)
    if kind == "upcast":
        return UpcastLinear(layer)
    if kind in KINDS and not isinstance(layer, QuantizedLinear):
        return QuantizedLinear(layer, kind)
    return layer


def dense_weight(layer: nn.Linear) -> Tensor:
    """Return the weight of a layer in torch's own layout, float32 of one that is quantized."""
    if isinstance(layer, QuantizedLinear):
        if layer.kind == "nvfp4":
            return nvfp4.dequantize_nvfp4(*layer.int4)
        return dense(layer.int4) if KINDS[layer.kind].in_groups else layer.weight.float() * layer.weight_scale
    weight = layer.weight.detach()
    return weight.to_dense() if weight.is_mkldnn else weight


def quantized_values(weight: Tensor | Int4Weight, kind: str) -> dict[str, Tensor]:
    """Return the tensors of a QuantizedLinear of `kind`, by their names in it, on the device of `weight` [N, K]: a
    dense one, or one that has 4 bits already."""
    if not KINDS[kind].in_groups:
        assert isinstance(weight, Tensor)
        if kind == "nvfp4":
            floats = nvfp4.quantize_nvfp4(weight)
            return {"weight": floats.packed, GROUP_SCALE: floats.group_scales, SCALE: floats.scales}
        values = quantize_rows(weight, KINDS[kind].weight)
        return dict(zip(("weight", SCALE), values, strict=True))
    made = quantize_int4(weight, GROUP.group) if isinstance(weight, Tensor) else weight
    return {leaf: tensor for leaf, tensor in zip(INT4_LEAVES, made, strict=True) if tensor is not None}


def declared_values(kind: str, rows: int, inputs: int, form: Int4Form = GROUP) -> dict[str, Tensor]:
    """Return what `quantized_values` would for a weight [rows, inputs], on the meta device. form: of 4 bits."""
    shapes: dict[str, tuple[int, torch.dtype]] = {"weight": (inputs, KINDS[kind].weight)}
    if KINDS[kind].weight == torch.uint8:
        form = Int4Form(nvfp4.GROUP) if kind == "nvfp4" else form
        groups = (inputs // form.group, nvfp4.FP8 if kind == "nvfp4" else torch.float16)
        shapes = {"weight": (inputs // 2, torch.uint8), GROUP_SCALE: groups}
        shapes |= {GROUP_MINIMUM: groups} if form.minimums else {}
    shapes[SCALE] = (1, torch.float32)
    return {leaf: torch.empty(rows, n, dtype=dtype, device="meta") for leaf, (n, dtype) in shapes.items()}


def quantized_layers(layers: Mapping[str, nn.Linear], kind: str) -> dict[str, QuantizedLinear]:
    """Return quantized layers made of `layers`, under the same names."""
    return {name: QuantizedLinear(layer, kind) for name, layer in layers.items()}


def unpack(network: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Give packed and quantized layers and converted convolutions plain weights: for tracers, which cannot see into
    oneDNN's layout, and for programs without quantized products. dtype: of weights that were quantized."""
    plain_convolutions(network)
    for name, layer in list(linear_layers(network)):
        if not isinstance(layer, (PackedLinear, QuantizedLinear)):
            continue
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=torch.float32)
        weight = dense_weight(layer)
        take_over(plain, layer, weight.to(dtype) if isinstance(layer, QuantizedLinear) else weight)
        replace_module(network, name, plain)
