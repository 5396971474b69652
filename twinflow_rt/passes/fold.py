"""Fold: evaluate everything that depends on time alone, once, and keep only the results.

For a schedule of N pairs (t, tt) a family's `fold` method yields tables of N rows. The network that
makes them exists on the meta device; `fold` lends it the parameters of one block at a time, in
float32 on the CPU, so what is folded away is read once and never resident together. At N = 1 the
single row is the norm weight of a plain pre-norm transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from .load import assign

Schedule = Sequence[tuple[float, float]]


class Foldable(Protocol):
    """What a family's unfolded network declares."""

    def fold(self, t: Tensor, tt: Tensor, resident: Callable) -> Iterator[tuple[str, Tensor]]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def fold(network: Foldable, read: Callable[[str], Tensor], schedule: Schedule) -> dict[str, Tensor]:
    """Tables of the folded layout, float32 on the CPU, keyed by buffer name.

    network: the unfolded network on the meta device. read(name): a parameter of it, any float dtype.
    schedule: the (t, tt) of each evaluation, as the network will receive them.
    """

    @contextmanager
    def resident(*prefixes: str) -> Iterator[None]:
        borrowed = {
            name: param for name, param in network.named_parameters()
            if any(name.startswith(prefix + ".") for prefix in prefixes)
        }  # fmt: skip
        for name in borrowed:
            assign(network, name, read(name).float().cpu())
        try:
            yield
        finally:
            for name, param in borrowed.items():
                assign(network, name, param.data)

    t, tt = torch.tensor(schedule, dtype=torch.float64).unbind(1)
    with torch.no_grad():
        return dict(network.fold(t, tt, resident))


def folded_away(unfolded: nn.Module, folded: nn.Module) -> dict[str, int]:
    """Parameter names that exist only before folding, with their sizes."""
    kept = {name for name, _ in folded.named_parameters()}
    return {name: p.numel() for name, p in unfolded.named_parameters() if name not in kept}

