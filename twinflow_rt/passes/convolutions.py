"""What a convolution of a decoder multiplies with, once its network is loaded: Winograd's form where that pays.

Modules are exchanged in place, as linear layers are (`layers`). The kernels as they were loaded are not kept beside
their transforms, which are larger: what wants them again (saving, tracers) has them read anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import library
from ..config import dtype_name
from ..native_conv import conv_winograd
from ..ops import OpTable
from ..ops.conv import winograd_points, winograd_weight
from ..ops.select import Target
from ..plan import Layers
from ..report import TRIM_EVERY, release_free_memory
from .upsample import UpsampleConv

NARROWEST = 96  # channels: with fewer the transforms take about as long as the products they save
WHY = "F(2x2, 3x3): 16 products in place of 36; 9 behind an enlargement"


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution with a border of one pixel whose weight is a `winograd_weight`; `original` reads its kernels."""

    original: Callable[[], Tensor]

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        return conv_winograd(x, self.weight, self.bias, added=added)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.original()


class WinogradUpsampleConv(WinogradConv2d, UpsampleConv):
    """The same behind a nearest enlargement by 2."""

    def enlarged(self, x: Tensor, ops: OpTable) -> Tensor:
        return conv_winograd(x, self.weight, self.bias, enlarged=True)


def conv_residual(residual: Tensor, layer: nn.Conv2d, x: Tensor) -> Tensor:
    """residual + layer(x), in one pass where the layer can."""
    y: Tensor = layer(x, residual) if isinstance(layer, WinogradConv2d) else layer(x).add_(residual)
    return y


def convert_convolutions(network: nn.Module, target: Target, read: Callable[[str], Tensor]) -> tuple[Layers, ...]:
    """Exchanges the convolutions of a loaded `network` that Winograd's form suits, and says how many.

    read(name): the tensor of that name as it was loaded. One weight at a time exists twice.
    """
    if refuses(target) is not None:
        return ()
    sizes, freed = [], 0
    for name, layer in list(suited(network)):
        enlarges = isinstance(layer, UpsampleConv)
        sizes.append(layer.weight.numel())
        freed += layer.weight.nbytes
        weight = winograd_weight(layer.weight.detach(), enlarges)
        converted: Any = layer
        if enlarges:
            converted.folded = None
        converted.__class__ = WinogradUpsampleConv if enlarges else WinogradConv2d
        converted.weight = nn.Parameter(weight, requires_grad=False)
        converted.original = lambda name=f"{name}.weight": read(name)
        if freed > TRIM_EVERY:
            freed = 0
            release_free_memory()
    return (Layers("winograd", len(sizes), sum(sizes), WHY),) if sizes else ()


def refuses(target: Target) -> str | None:
    """Why a target has no convolutions in Winograd's form, or None."""
    if target.dtype != torch.float32:
        return f"float32 alone keeps its accuracy in it, not {dtype_name(target.dtype)}"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    return library.refuses(target)


def suited(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """The convolutions that have a form of Winograd's which pays, with their names."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and not isinstance(layer, WinogradConv2d) and _suits(layer):
            yield name, layer


def _suits(layer: nn.Conv2d) -> bool:
    plain = (layer.kernel_size, layer.stride, layer.dilation) == ((3, 3), (1, 1), (1, 1))
    alone = layer.groups == 1 and layer.padding == (1, 1) and layer.padding_mode == "zeros"
    return plain and alone and min(layer.in_channels, layer.out_channels) >= NARROWEST


def winograd_bytes(network: nn.Module) -> int:
    """What `convert_convolutions` adds to a float32 network that has its kernels, and those of `fold_upsampling`."""
    added = 0
    for _, layer in suited(network):
        each = 4 * layer.in_channels * layer.out_channels
        enlarges = isinstance(layer, UpsampleConv)
        added += each * (winograd_points(enlarges) - 9 - (16 if enlarges else 0))
    return added


def plain_convolutions(network: nn.Module) -> None:
    """Gives converted layers their kernels back, unfolded."""
    for layer in network.modules():
        if isinstance(layer, WinogradConv2d):
            plain: Any = layer
            plain.__class__ = UpsampleConv if isinstance(layer, UpsampleConv) else nn.Conv2d
            plain.weight = nn.Parameter(plain.__dict__.pop("original")(), requires_grad=False)
