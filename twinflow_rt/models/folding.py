"""What a velocity network and `passes.fold` share: how parameters are lent, and what a linear layer can absorb."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

# resident(*prefixes): a context in which the parameters under these names are real, float32, on the CPU. A network's
# `fold` gets it, for the network itself may be on the meta device.
Resident = Callable[..., AbstractContextManager[None]]


@dataclass(frozen=True)
class Absorption:
    """Rows of a table that stand around a linear layer, y = gate * (W (scale * x + shift) + b).

    bias=False: the checkpoint has no b; a shift then makes one.
    """

    table: str
    shift: int | None = None
    scale: int | None = None
    gate: int | None = None
    bias: bool = True
