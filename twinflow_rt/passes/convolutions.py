"""What a decoder's convolutions multiply with on a CPU, once its network is loaded, and how one kind becomes another.

    plain       torch's own `F.conv2d`, which arranges the weight anew in every call
    packed      the weight in oneDNN's layout, made once
    winograd    wide 3x3 convolutions in float32: transformed weights, fewer products (`ops.conv`)

Modules are exchanged in place, as linear layers are (`layers`). What is saved, and what tracers get, are the weights as
they were loaded. Transformed ones are larger, so the others are not kept beside them, but read anew where wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.load_report import TRIM_EVERY
from ..config import dtype_name, has_native
from ..host_memory import release_free_memory
from ..models.layers import UpsampleConv
from ..ops import OpTable, linear
from ..ops.conv import conv_packed, pack_conv, pack_folded, upsample_conv_packed, winograd_points, winograd_weight
from ..ops.native import library
from ..ops.native.conv import conv_winograd
from ..ops.selection import Target
from .layer_groups import Layers

NARROWEST = 96  # channels: with fewer the transforms take about as long as the products they save
KINDS = (nn.Conv2d, UpsampleConv)  # that are exchanged; other classes have ways of their own
WHY = {"packed": "laid out once, not per call", "winograd": "16 products in place of 36, 9 behind an enlargement"}


class ConvertedConv2d(nn.Conv2d):
    """A convolution whose weight is another than its kernels, which `loaded` gives as they were loaded."""

    def loaded(self) -> Tensor:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.loaded()


class PackedConv2d(ConvertedConv2d):
    """A convolution whose weight is in oneDNN's layout."""

    def forward(self, x: Tensor) -> Tensor:
        return conv_packed(self, x)

    def loaded(self) -> Tensor:
        return self.weight.detach().to_dense()


class PackedUpsampleConv(UpsampleConv):
    """Behind a nearest enlargement by 2, with a folded kernel in oneDNN's layout."""

    folded: Tensor

    def enlarged(self, x: Tensor, ops: OpTable) -> Tensor:
        return upsample_conv_packed(x, self.folded, self.bias)


class WinogradConv2d(ConvertedConv2d):
    """A 3x3 convolution with a border of one pixel and a `winograd_weight`. `loaded` reads its kernels anew."""

    loaded: Callable[[], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return conv_winograd(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return residual + self(x), in one pass."""
        return conv_winograd(x, self.weight, self.bias, added=residual)


class WinogradUpsampleConv(WinogradConv2d, UpsampleConv):
    """The same behind a nearest enlargement by 2."""

    def enlarged(self, x: Tensor, ops: OpTable) -> Tensor:
        return conv_winograd(x, self.weight, self.bias, enlarged=True)


def convert_convolutions(network: nn.Module, target: Target, read: Callable[[str], Tensor]) -> tuple[Layers, ...]:
    """Exchanges the convolutions of a loaded `network` for what suits them on `target`, and says how many.

    read(name): the tensor of that name as it was loaded. One weight at a time exists twice.
    """
    done: dict[str, list[int]] = {}
    freed, transforms = 0, refuses(target) is None
    for name, layer in list(network.named_modules()):
        if type(layer) not in KINDS:
            continue
        wide = transforms and _suits(layer)
        if not wide and packing_refuses(layer, target):
            continue
        freed += layer.weight.nbytes
        done.setdefault("winograd" if wide else "packed", []).append(layer.weight.numel())
        if wide:
            _transform(layer, partial(read, f"{name}.weight"))
        else:
            _pack(layer)
        if freed > TRIM_EVERY:
            freed = 0
            release_free_memory()
    return tuple(Layers(kind, len(sizes), sum(sizes), WHY[kind]) for kind, sizes in done.items())


def _transform(layer: Any, loaded: Callable[[], Tensor]) -> None:
    enlarges = isinstance(layer, UpsampleConv)
    weight = winograd_weight(layer.weight.detach(), enlarges)
    layer.__class__ = WinogradUpsampleConv if enlarges else WinogradConv2d
    layer.weight, layer.loaded = nn.Parameter(weight, requires_grad=False), loaded
    if enlarges:
        layer.folded = None


def _pack(layer: Any) -> None:
    enlarges = isinstance(layer, UpsampleConv)
    if enlarges:
        layer.folded = pack_folded(layer.folded)
        layer.__class__ = PackedUpsampleConv
    else:
        layer.weight = nn.Parameter(pack_conv(layer), requires_grad=False)
        layer.__class__ = PackedConv2d


def packing_refuses(layer: nn.Conv2d, target: Target) -> str | None:
    """Why a convolution is not packed for a target, or None."""
    device = torch.device(target.device)
    if reason := linear.packing_refuses(device, target.dtype):
        return reason
    if not has_native(target.dtype, device):
        return f"this CPU does not multiply {dtype_name(target.dtype)}"
    if isinstance(layer, UpsampleConv):
        return None if layer.folded is not None else "not folded"
    return None if layer.padding_mode == "zeros" else "its border is not of zeros"


def refuses(target: Target) -> str | None:
    """Why a target has no convolutions in Winograd's form, or None."""
    if target.dtype != torch.float32:
        return f"float32 alone keeps its accuracy in it, not {dtype_name(target.dtype)}"
    return library.refuses(target) or linear.packing_refuses(torch.device(target.device), target.dtype)


def suited(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """The convolutions that have a form of Winograd's which pays, with their names."""
    for name, layer in network.named_modules():
        if type(layer) in KINDS and _suits(layer):
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
        plain: Any = layer
        if isinstance(layer, PackedUpsampleConv):
            plain.__class__, plain.folded = UpsampleConv, None
        elif isinstance(layer, ConvertedConv2d):
            weight = layer.loaded()
            plain.__dict__.pop("loaded", None)
            plain.__class__ = UpsampleConv if isinstance(layer, UpsampleConv) else nn.Conv2d
            plain.weight = nn.Parameter(weight, requires_grad=False)
