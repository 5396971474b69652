"""Folded upsampling: a nearest enlargement by 2 and the 3x3 convolution behind it as one transposed convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import OpTable, fold_upsample
from ..ops.selection import Choice


class UpsampleConv(nn.Conv2d):
    """The convolution of such a pair, under the checkpoint's names. `folded` is its other kernel, if wanted:
    not saved, so that what is saved are the weights as they were loaded."""

    folded: Tensor | None

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer, 3, padding=1)
        self.register_buffer("folded", None, persistent=False)

    def enlarged(self, x: Tensor, ops: OpTable) -> Tensor:
        """[B, inner, H, W] -> [B, outer, 2H, 2W]."""
        y: Tensor = ops.upsample_conv(x, self.weight if self.folded is None else self.folded, self.bias)
        return y


def folded_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """What `fold_upsampling` adds to a network in `dtype`."""
    convs = [m for m in network.modules() if isinstance(m, UpsampleConv)]
    return sum(16 * m.in_channels * m.out_channels * dtype.itemsize for m in convs)


def fold_upsampling(network: nn.Module, choices: Sequence[Choice]) -> None:
    """Folds the kernels of a loaded `network` if that is what `choices` say of `upsample_conv`."""
    folded = any(choice.op == "upsample_conv" and choice.chosen == "folded" for choice in choices)
    for module in network.modules():
        if isinstance(module, UpsampleConv):
            module.folded = fold_upsample(module.weight.detach()) if folded else None
