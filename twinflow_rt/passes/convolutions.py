"""What a decoder's convolutions multiply with on a CPU, once its network is loaded, and how one kind replaces another.

    plain       torch's own `F.conv2d`, which arranges the weight anew in every call
    packed      the weight in oneDNN's layout, made once
    winograd    wide 3x3 convolutions in float32: transformed weights, fewer products (`ops.conv`)

Another kind is another module, set on the parent as for linear layers (`layers`). What is saved, and what tracers get,
are the weights as they were loaded. Transformed ones are larger, so the others are not kept beside them, but read anew
where wanted.

Before that, on any device, a nearest enlargement by 2 and the 3x3 convolution behind it may become one transposed
convolution: `fold_upsampling`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.load_report import TRIM_EVERY
from ..config import dtype_name, has_native
from ..host_memory import release_free_memory
from ..models.layers import UpsampleConv
from ..models.meta_device import meta_device
from ..ops import OpTable, Target, fold_upsample, linear
from ..ops.conv import conv_packed, pack_conv, pack_folded, upsample_conv_packed, winograd_points, winograd_weight
from ..ops.native import library
from ..ops.native.conv import conv_winograd
from ..ops.selection import Choice
from .layer_groups import Layers
from .replace import replace_module, take_over

NARROWEST = 96  # channels: with fewer the transforms take about as long as the products they save
KINDS = (nn.Conv2d, UpsampleConv)  # that are replaced; other classes have ways of their own
WHY = {"packed": "laid out once, not per call", "winograd": "16 products in place of 36, 9 behind an enlargement"}


def folded_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes that `fold_upsampling` adds to a network in `dtype`."""
    convs = [m for m in network.modules() if isinstance(m, UpsampleConv)]
    return sum(16 * m.in_channels * m.out_channels * dtype.itemsize for m in convs)


def fold_upsampling(network: nn.Module, choices: Sequence[Choice]) -> None:
    """Fold the kernels of a loaded `network` if that is what `choices` say of `upsample_conv`; else unfold them."""
    folded = any(choice.op == "upsample_conv" and choice.chosen == "folded" for choice in choices)
    for module in network.modules():
        if isinstance(module, UpsampleConv):
            module.folded = fold_upsample(module.weight.detach()) if folded else None


class ConvertedConv2d(nn.Conv2d):
    """A convolution whose weight is another than its kernels, which `loaded` returns as they were loaded."""

    def loaded(self) -> Tensor:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.loaded()


class PackedConv2d(ConvertedConv2d):
    """A convolution whose weight is in oneDNN's layout."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(**_settings(layer))
        take_over(self, layer, pack_conv(layer))

    def forward(self, x: Tensor) -> Tensor:
        return conv_packed(self, x)

    def loaded(self) -> Tensor:
        return self.weight.detach().to_dense()


class PackedUpsampleConv(UpsampleConv):
    """Behind a nearest enlargement by 2, with a folded kernel in oneDNN's layout."""

    folded: Tensor

    def __init__(self, layer: UpsampleConv) -> None:
        with meta_device():
            super().__init__(layer.in_channels, layer.out_channels)
        take_over(self, layer, layer.weight.detach())
        assert layer.folded is not None
        self.folded = pack_folded(layer.folded)

    def enlarged(self, x: Tensor, ops: OpTable) -> Tensor:
        return upsample_conv_packed(x, self.folded, self.bias)


class WinogradConv2d(ConvertedConv2d):
    """A 3x3 convolution with a border of one pixel and a `winograd_weight`. read(): reads its kernels anew."""

    def __init__(self, layer: nn.Conv2d, read: Callable[[], Tensor]) -> None:
        super().__init__(**_settings(layer))
        take_over(self, layer, winograd_weight(layer.weight.detach(), enlarged=False))
        self.loaded = read  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return conv_winograd(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return residual + self(x), in one pass."""
        return conv_winograd(x, self.weight, self.bias, added=residual)


class WinogradUpsampleConv(ConvertedConv2d, UpsampleConv):
    """The same behind a nearest enlargement by 2."""

    def __init__(self, layer: UpsampleConv, read: Callable[[], Tensor]) -> None:
        with meta_device():
            UpsampleConv.__init__(self, layer.in_channels, layer.out_channels)
        take_over(self, layer, winograd_weight(layer.weight.detach(), enlarged=True))
        self.loaded = read  # type: ignore[method-assign]

    def enlarged(self, x: Tensor, ops: OpTable) -> Tensor:
        return conv_winograd(x, self.weight, self.bias, enlarged=True)


def _settings(layer: nn.Conv2d) -> dict[str, Any]:
    """Return the arguments that make a convolution like `layer`, on the meta device and without a bias."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {**{name: getattr(layer, name) for name in names}, "bias": False, "device": "meta"}


def convert_convolutions(network: nn.Module, target: Target, read: Callable[[str], Tensor]) -> tuple[Layers, ...]:
    """Replace the convolutions of a loaded `network` by what suits them on `target`, and return how many.

    read(name): the tensor of that name as it was loaded. One weight at a time exists twice.
    """
    done: dict[str, list[int]] = {}
    freed, transforms = 0, refuses(target) is None
    for name in [name for name, layer in network.named_modules() if type(layer) in KINDS]:
        layer: Any = network.get_submodule(name)
        size, nbytes = layer.weight.numel(), layer.weight.nbytes
        if transforms and _suits(layer):
            kind, to = "winograd", WinogradUpsampleConv if isinstance(layer, UpsampleConv) else WinogradConv2d
            layer = to(layer, partial(read, f"{name}.weight"))
        elif packing_refuses(layer, target) is None:
            kind, layer = "packed", (PackedUpsampleConv if isinstance(layer, UpsampleConv) else PackedConv2d)(layer)
        else:
            continue
        replace_module(network, name, layer)
        done.setdefault(kind, []).append(size)
        freed += nbytes
        if freed > TRIM_EVERY:
            freed = 0
            release_free_memory()
    return tuple(Layers(kind, len(sizes), sum(sizes), WHY[kind]) for kind, sizes in done.items())


def packing_refuses(layer: nn.Conv2d, target: Target) -> str | None:
    """Return why a convolution is not packed for a target, or None."""
    device = torch.device(target.device)
    if reason := linear.packing_refuses(device, target.dtype):
        return reason
    if not has_native(target.dtype, device):
        return f"this CPU does not multiply {dtype_name(target.dtype)}"
    if isinstance(layer, UpsampleConv):
        return None if layer.folded is not None else "not folded"
    return None if layer.padding_mode == "zeros" else "its border is not of zeros"


def refuses(target: Target) -> str | None:
    """Return why a target has no convolutions in Winograd's form, or None."""
    if target.dtype != torch.float32:
        return f"float32 alone keeps its accuracy in it, not {dtype_name(target.dtype)}"
    return library.refuses(target) or linear.packing_refuses(torch.device(target.device), target.dtype)


def suited(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Yield the convolutions that are faster in Winograd's form, with their names."""
    for name, layer in network.named_modules():
        if type(layer) in KINDS and _suits(layer):
            yield name, layer


def _suits(layer: nn.Conv2d) -> bool:
    plain = (layer.kernel_size, layer.stride, layer.dilation) == ((3, 3), (1, 1), (1, 1))
    alone = layer.groups == 1 and layer.padding == (1, 1) and layer.padding_mode == "zeros"
    return plain and alone and min(layer.in_channels, layer.out_channels) >= NARROWEST


def winograd_bytes(network: nn.Module) -> int:
    """Return the bytes that `convert_convolutions` adds to a float32 network whose upsampling is folded."""
    added = 0
    for _, layer in suited(network):
        each = 4 * layer.in_channels * layer.out_channels
        enlarges = isinstance(layer, UpsampleConv)
        added += each * (winograd_points(enlarges) - 9 - (16 if enlarges else 0))
    return added


def plain_convolutions(network: nn.Module) -> None:
    """Give converted layers their kernels back, unfolded."""
    for name in [name for name, m in network.named_modules() if isinstance(m, (ConvertedConv2d, PackedUpsampleConv))]:
        layer: Any = network.get_submodule(name)
        with meta_device():
            enlarges = isinstance(layer, UpsampleConv)
            plain = UpsampleConv(layer.in_channels, layer.out_channels) if enlarges else nn.Conv2d(**_settings(layer))
        take_over(plain, layer, layer.loaded() if isinstance(layer, ConvertedConv2d) else layer.weight.detach())
        replace_module(network, name, plain)
