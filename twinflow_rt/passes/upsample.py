"""Folded upsampling: a nearest enlargement by 2 and the 3x3 convolution behind it as one transposed convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..models.layers import UpsampleConv
from ..ops import fold_upsample
from ..ops.selection import Choice


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
