"""Which precision keeps a network within a memory budget, with more bits for kinds of layers that measured sensitive.

For precision "auto" only, and only where blocks would stream otherwise: reading them again in every evaluation costs
more than 4 bits cost in time, but not in exactness. So no more layers get 4 bits than have to.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..config import dtype_name
from ..errors import ConfigError
from ..passes.layer_groups import Group
from ..passes.layers import declared_values
from ..passes.quantize import refuses
from .precision import AUTO, Arithmetic, Measurement, kept_here, read

LIGHTER = {None: ("int8", "int4"), "int8": ("int4",), "fp8": ("int4",)}  # what takes less memory, the most exact first
UNMEASURED = "auto: int4 was not measured here (`twinflow-rt sensitivity MODEL --precision int4 --save` does)"


def fit(
    chosen: Arithmetic, network: Checkpoint, device: torch.device, budget: int, plan: Callable[[Arithmetic], Any]
) -> tuple[Arithmetic, Any]:
    """Return `chosen` and its memory plan or, where blocks of the network would stream within `budget`, the first of
    `LIGHTER` with which none does, else the last.

    plan: the `MemoryPlan` of an arithmetic; its ConfigError is raised where nothing fits. What was measured to exceed
    its budget of errors is not taken; int4 that was measured becomes a `mix`.
    """
    measured = _measured(network, device, chosen.dtype)
    best, refused = None, None
    for name in (None, *LIGHTER[chosen.precision]):
        one = chosen if name is None else _lighter(chosen, name, device, measured.get(name))
        if one is None:
            continue
        try:
            memory = plan(one)
            if name == "int4" and name in measured:
                one = _mixed(one, measured, 0 if memory.streamed else budget - memory.peak)
                memory = plan(one) if one is not None and one.skip_layers else memory
        except ConfigError as error:
            refused = error
            continue
        best = best if one is None else (one, memory)
        if best is not None and not best[1].streamed:
            break
    if best is None:
        assert refused is not None
        raise refused
    return best


def mix(
    int4: Sequence[Group], int8: Sequence[Group], room: float, itemsize: int
) -> tuple[tuple[str, ...], float]:  # fmt: skip
    """Return `skip_layers` of precision "int4" that spend up to `room` bytes where they lower the error most, and the
    error that is left: groups of layers get int8 ("NAME:int8") or, where its error is known, their dtype of `itemsize`
    bytes ("NAME"). int4, int8: the error of each group alone; their squares add up. A pure function."""
    inputs, eight = 1 << 12, {group.name: group.error for group in int8}
    nbytes = sum(value.nbytes for value in declared_values("int4", 1, inputs).values()) / inputs  # of a weight
    steps = []
    for group in int4:
        rest = min(eight.get(group.name, 0.0), group.error) ** 2
        steps.append((group.error**2 - rest, group.parameters * (1 - nbytes), f"{group.name}:int8"))
        if rest:
            steps.append((rest, group.parameters * float(itemsize - 1), group.name))
    square, taken = sum(group.error**2 for group in int4), dict[str, str]()
    for gain, size, entry in sorted(steps, key=lambda step: -step[0] / step[1]):
        name, _, kind = entry.partition(":")
        if size <= room and (kind or name in taken):
            taken[name], room, square = entry, room - size, square - gain
    return tuple(taken.values()), math.sqrt(max(square, 0.0))


def _measured(network: Checkpoint, device: torch.device, dtype: torch.dtype) -> dict[str, Measurement]:
    try:
        paths = kept_here(("int8", "int4"), network, device, dtype)
    except ConfigError:  # no place to keep any
        return {}
    return {name: read(path) for name, path in paths.items() if os.path.isfile(path)}


def _lighter(
    chosen: Arithmetic, name: str, device: torch.device, measured: Measurement | None
) -> Arithmetic | None:  # fmt: skip
    """Return what precision `name` is in the place of `chosen`, None where it is not to be taken."""
    if refuses(name, device, chosen.dtype) or (name == "int8" and measured and measured.error > measured.budget):
        return None
    before = chosen.precision or dtype_name(chosen.dtype)
    notes = (f"{AUTO}{name}: memory_budget does not hold the network in {before}", *chosen.notes[1:])
    if measured is None:
        return Arithmetic(chosen.dtype, name, notes=(*notes, UNMEASURED) if name == "int4" else notes)
    skip_layers = measured.skip_layers if name == "int8" else ()
    return Arithmetic(chosen.dtype, name, skip_layers, sensitivity=measured.groups, notes=notes)


def _mixed(int4: Arithmetic, measured: Mapping[str, Measurement], room: int) -> Arithmetic | None:
    """Return `int4` with the `mix` for so many bytes of room, None where its error exceeds the budget of errors."""
    found, int8 = measured["int4"], measured["int8"].groups if "int8" in measured else ()
    skip_layers, error = mix(found.groups, int8, room, int4.dtype.itemsize)
    if error > found.budget:
        return None
    kinds = f"{len(skip_layers)} of {len(found.groups)} kinds of layers"
    note = f"auto: {kinds} in more than 4 bits, error about {error:.2e}"
    return replace(int4, skip_layers=skip_layers, notes=(*int4.notes, note))
