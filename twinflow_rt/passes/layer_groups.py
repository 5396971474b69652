"""Groups of layers as plans, records and commands show them: what layers became, and how sensitive they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layers:
    """Layers that became one `kind` (see `layers` and `convolutions`): how many, their parameters, and why."""

    kind: str
    count: int
    parameters: int
    why: str

    def __str__(self) -> str:
        return f"{self.kind:<20} {self.count} layers, {count_text(self.parameters)} ({self.why})"


@dataclass(frozen=True)
class Group:
    """Linear layers of one name (without block numbers, see `blocks.group_of`) and the error of quantizing them alone:
    |F_quantized - F| / |F| of one evaluation (`planning.sensitivity`)."""

    name: str
    layers: int
    parameters: int
    error: float

    def __str__(self) -> str:
        return f"{self.error:.2e}  {self.layers:>4} layers  {count_text(self.parameters):>8}  {self.name}"


def treatment(group: Group, skip_layers: Sequence[str]) -> str:
    """Return what `skip_layers` make of a group, to be written behind it: nothing, "skipped" or the other kind."""
    kinds = dict(entry.partition(":")[::2] for entry in skip_layers)
    return f"  {kinds[group.name] or 'skipped'}" if group.name in kinds else ""


def count_text(n: int) -> str:
    """Return a number of parameters as text: 1.234B, 12.34M, 1.23K."""
    if n >= 1e9:
        return f"{n / 1e9:.3f}B"
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.2f}K"
