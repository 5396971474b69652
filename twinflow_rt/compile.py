"""The compile path: a checkpoint and a schedule become a program without time.

    load    map the files, compare every name and shape; nothing is read yet
    fold    evaluate all time embeddings and modulations of the schedule into tables (float32)
    fuse    stream the remaining tensors to the device, merged where they share an input
    select  one implementation per op, refusals stated
    plan    say what was done

The result holds no time embedder and no modulation layer. Another schedule needs other tables:
`Program.refold` makes them from the checkpoint, so long as the program still has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ConfigError
from .models import Family
from .ops.select import Target, select
from .passes.fold import Schedule, fold, folded_away
from .passes.load import Checkpoint, Layout, Progress, assign, check, fetch, materialize
from .plan import Plan, group_folded, parameter_bytes

MAX_EVALUATIONS = 100


@dataclass
class Program:
    """A compiled velocity network: `network(latents, modulation(step), context)` per evaluation."""

    network: nn.Module
    schedule: tuple[tuple[float, float], ...]
    plan: Plan
    tables: Callable[[Schedule], dict[str, torch.Tensor]] | None = None

    def refold(self, schedule: Schedule) -> None:
        """Switches to another schedule by folding anew from the checkpoint.

        Raises ConfigError if the program came from a saved artifact, which holds one schedule only.
        """
        schedule = tuple(schedule)
        if schedule == self.schedule:
            return
        if self.tables is None:
            raise ConfigError(
                f"this artifact is folded for {_named(self.schedule)}; {_named(schedule)} needs the checkpoint: "
                "load the model folder instead, or save another artifact"
            )
        device = next(self.network.parameters()).device
        for name, table in self.tables(schedule).items():
            assign(self.network, name, table.to(device))
        self.network.folded_steps = len(schedule)
        self.schedule, self.plan = schedule, replace(self.plan, schedule=schedule)


def compile_network(
    source: Any, family: Family, schedule: Sequence[tuple[float, float]], *, device: torch.device, dtype: torch.dtype,
    progress: Progress | None = None, loras: tuple[str, ...] = (),
) -> Program:  # fmt: skip
    """Compiles a network for the (t, tt) pairs of `schedule` (1 to 100 of them).

    source: an open `passes.load.Checkpoint`, or one with adapters merged in (`passes.lora.Merged`).
    Raises CheckpointError for anything about the files, ConfigError for the schedule.
    """
    start, schedule = time.perf_counter(), tuple(schedule)
    if not 1 <= len(schedule) <= MAX_EVALUATIONS:
        raise ConfigError(f"a schedule of {len(schedule)} evaluations cannot be folded; use 1 to {MAX_EVALUATIONS}")
    config = family.config.from_dict(source.config)
    with torch.device("meta"):
        unfolded, network = family.network(config), family.network(config, folded_steps=len(schedule))
    check(unfolded.state_dict(), source, family.layout)

    def tables(steps: Schedule) -> dict[str, torch.Tensor]:
        return fold(unfolded, source.get, steps)

    constants = tables(schedule)
    for name, placeholder in network.state_dict().items():
        if name in constants:
            tensor = constants[name].to(device)
        else:
            rows = placeholder.shape[0] if placeholder.ndim else 0
            tensor = fetch(name, rows, source, family.layout, device, dtype)
            if progress is not None:
                progress(tensor.nbytes)
        assign(network, name, tensor)
    network.eval().ops, choices = select(Target.of(device, dtype, getattr(network.config, "head_dim", None)))
    away = folded_away(unfolded, network)
    before = sum(p.numel() for p in unfolded.parameters())
    plan = Plan(
        family=family.name, source=Path(source.folder).parent.name, device=str(device), dtype=str(dtype).removeprefix("torch."),
        schedule=schedule, choices=choices, parameters_before=before, parameters_after=before - sum(away.values()),
        bytes_before=before * dtype.itemsize, bytes_after=parameter_bytes(network), folded=group_folded(away),
        loras=loras, notes=(f"compiled in {time.perf_counter() - start:.2f} s",),
    )  # fmt: skip
    return Program(network, schedule, plan, tables)


def load_program(
    saved: Checkpoint, family: Family, plan: Plan, *, device: torch.device, dtype: torch.dtype,
    progress: Progress | None = None,
) -> Program:  # fmt: skip
    """The program of a saved artifact: no pass runs again, ops are selected for this machine."""
    with torch.device("meta"):
        network = family.network(family.config.from_dict(saved.config), folded_steps=len(plan.schedule))

    def dtype_of(name: str, kind: torch.dtype) -> torch.dtype:
        return torch.float32 if saved.dtype(name) == torch.float32 else kind

    materialize(network, saved, Layout(dtype_of=dtype_of), device, dtype, progress)
    network.ops, choices = select(Target.of(device, dtype, getattr(network.config, "head_dim", None)))
    return Program(network, plan.schedule, replace(plan, device=str(device), choices=choices))


def _named(schedule: Schedule) -> str:
    return f"{len(schedule)} evaluation(s) at (t, tt) = " + ", ".join(f"({t:g}, {tt:g})" for t, tt in schedule)
