"""Merges projections that read the same input (QKV; w1|w3) into one weight, and splits them again.

A family declares `FUSED`: merged name -> the checkpoint's names, whose rows follow one another. Both
are relative to a block, so one entry serves every layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Fused = Mapping[str, tuple[str, ...]]


def sources(name: str, fused: Fused) -> tuple[str, ...]:
    """The checkpoint's tensor names that make up the network's tensor `name` (often just itself)."""
    for merged, parts in fused.items():
        if name == merged or name.endswith("." + merged):
            prefix = name[: -len(merged)]
            return tuple(prefix + part for part in parts)
    return (name,)


def merge(parts: list[Tensor]) -> Tensor:
    """Stacks the row blocks of one merged weight."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def split(weights: Mapping[str, Tensor], fused: Fused) -> dict[str, Tensor]:
    """Inverse of merging over a whole state dict: the checkpoint's names, equal row blocks."""
    out = {}
    for name, weight in weights.items():
        names = sources(name, fused)
        out.update(zip(names, weight.chunk(len(names)), strict=True))
    return out
