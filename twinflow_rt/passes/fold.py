"""Fold: evaluate everything that depends on time alone, once, and keep only the results.

For a schedule of N pairs (t, tt) a family's `fold` method yields tables of N rows. The network that
makes them exists on the meta device; `fold` lends it the parameters of one block at a time, in
float32 on the CPU, so what is folded away is read once and never resident together.

At N = 1 what is left depends on where a family's constants act.

    On norms with weights of their own (Z-Image): scale and gate multiply the weights of the norms
    before and after a branch, and a table row *is* that product. Nothing else remains: the block is
    a plain transformer block whose norm weights are that row.

    Beside linear layers (Qwen-Image, whose norms have no weights): `absorb` moves the row into the
    layers, scale into columns, shift into the bias, gate into rows.

A gate before a norm cannot move into the layer ahead of it (the norm would divide it out again), so
a sandwich-norm family declares no absorption. Nor would moving its first norm's weights into the next
layer's columns gain anything: the norm multiplies anyway, and the weights would be rounded once more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.reading import assign
from ..errors import ConfigError
from ..models.folding import Absorption

Schedule = Sequence[tuple[float, float]]


def fold(network: Any, read: Callable[[str], Tensor], schedule: Schedule) -> dict[str, Tensor]:
    """Return the tables of the folded layout by buffer name, float32 on the CPU.

    network: the unfolded network on the meta device, whose `fold(t, tt, resident)` yields (buffer name, table).
    read(name): a parameter of it, any float dtype. schedule: the (t, tt) of each evaluation, as the network will
    receive them.
    """

    @contextmanager
    def resident(*prefixes: str) -> Iterator[None]:
        borrowed = {
            name: param for name, param in network.named_parameters()
            if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
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


@dataclass(frozen=True)
class Folded:
    """The tables of a schedule by buffer name. key: stands for exactly these tensors in keys, and keeps none alive."""

    tables: Mapping[str, Tensor]
    key: object = field(default_factory=object)


class ScheduleTables:
    """The tables of schedules, on the device `home`; the least recently used go where together they exceed `most`
    bytes, never those asked for last."""

    def __init__(self, most: int, home: torch.device) -> None:
        self.most, self.home = most, home
        self._kept: OrderedDict[Hashable, Folded] = OrderedDict()

    def get(self, schedule: Hashable, make: Callable[[], Mapping[str, Tensor]]) -> Folded:
        """Return the tables of `schedule`: those kept, else what `make` returns, kept from now on."""
        folded = self._kept.pop(schedule, None)
        if folded is None:
            folded = Folded({name: table.to(self.home) for name, table in make().items()})
        self._kept[schedule] = folded
        while len(self._kept) > 1 and self.nbytes > self.most:
            self._kept.popitem(last=False)
        return folded

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tables kept."""
        return sum(table.nbytes for folded in self._kept.values() for table in folded.tables.values())


def folded_away(unfolded: nn.Module, folded: nn.Module) -> dict[str, int]:
    """Return the parameters that exist only before folding: name -> size."""
    kept = {name for name, _ in folded.named_parameters()}
    return {name: p.numel() for name, p in unfolded.named_parameters() if name not in kept}


def absorb(
    layers: Mapping[str, Absorption], tables: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every layer's weight and bias with its constants inside, float32:

        W' = diag(gate) W diag(scale)        b' = gate * (b + W shift)

    tables: of one step each, [1, rows, dim]. read(name): a layer's tensor, on the device to compute on; a weight may be
    a 1x1 convolution's. The caller rounds, once. At most two copies of one weight exist at a time, if the caller lets
    go of what it got before it asks for more. Raises ConfigError when a table has more than one step.
    """
    for name, what in layers.items():
        table = tables[what.table]
        if len(table) != 1:
            raise ConfigError(f"{name} cannot absorb the constants of {len(table)} steps: fold one (t, tt) pair")
        bias = read(name + ".bias").float() if what.bias else None
        weight, bias = _absorbed(what, table[0], read(name + ".weight").float(), bias)
        yield name + ".weight", weight
        del weight
        if bias is not None:
            yield name + ".bias", bias


def _absorbed(what: Absorption, table: Tensor, kernel: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return new weight and bias of a layer that does what `kernel`, `bias` and the rows around them do."""
    table, weight = table.to(kernel.device, torch.float32), kernel.flatten(1)
    if what.shift is not None:
        shifted = weight @ table[what.shift]
        bias = shifted if bias is None else bias + shifted
    if what.scale is not None:
        weight = weight * table[what.scale]
    if what.gate is not None:
        weight = weight * table[what.gate, :, None]
        bias = None if bias is None else bias * table[what.gate]
    return weight.view(kernel.shape), bias
