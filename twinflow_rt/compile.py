"""The compile path: a checkpoint and a schedule become a program without time.

    load    map the files, compare every name and shape; nothing is read yet
    fold    evaluate all time embeddings and modulations of the schedule into tables (float32)
    absorb  at one evaluation, where the family can: move the tables into the weights beside them
    fuse    stream the remaining tensors to the device, merged where they share an input
    pack    lay out linear layers for the CPU, quantize them where asked to (`passes.quantize`)
    select  one implementation per op, refusals stated
    plan    say what was done

The result holds no time embedder and no modulation layer. Another schedule needs other constants:
`Program.refold` makes them from the checkpoint, so long as the program still has one, and keeps those of both. Adapters
are merged into the checkpoint's tensors as these passes read them (`checkpoint.lora`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.layout import Layout, check
from .checkpoint.lora import Merged
from .checkpoint.reading import Progress, Reader, assign, materialize, read_into
from .config import dtype_name
from .errors import ConfigError
from .families import Family
from .models.meta_device import meta_device
from .ops import Target, select
from .ops.int4 import Int4Weight
from .ops.selection import Choice
from .passes import fold as folding
from .passes import quantize
from .passes.fold import Folded, Schedule, ScheduleTables, fold, folded_away
from .passes.layer_groups import Group
from .plan import Plan
from .planning.parameters import group_parameters, parameter_bytes
from .runtime.parallel import Ulysses
from .runtime.streaming import Streaming
from .sampling.scheduler import MAX_EVALUATIONS

TABLES = 128 << 20  # bytes of the tables of all schedules that a program keeps: of 60 evaluations of Z-Image's network


@dataclass(frozen=True)
class Recipe:
    """What a program is compiled from, and how.

    source: an open checkpoint, or one with adapters merged in (`checkpoint.lora.Merged`). absorb: whether the constants
    of a single evaluation go into the weights, where the family declares that they can (`absorptions`): exact in
    float32, and in bfloat16 within 1.1x of the unfolded network's error. precision, skip_layers: of the linear layers,
    see `quantize.convert_layers`. fp8_attention: whether attention's scores are float8 products (`ops.attention_fp8`).
    sensitivity: what `skip_layers` was measured by, if it was. notes: on the choice of all this, for the plan.
    streamed: how many of the last blocks come and go as they run (see `runtime.streaming`). tables_bytes: what
    the tables of all schedules together may take; those in use may take more. tables_on_host: whether those that are
    not in use are kept in host memory."""

    source: Checkpoint
    family: Family
    device: torch.device
    dtype: torch.dtype
    absorb: bool = True
    precision: str | None = None
    skip_layers: tuple[str, ...] = ()
    fp8_attention: bool = False
    sensitivity: tuple[Group, ...] = ()
    notes: tuple[str, ...] = ()
    streamed: int = 0
    tables_bytes: int = TABLES
    tables_on_host: bool = False

    @property
    def absorbs(self) -> bool:
        """`absorb`, but where a CPU's blocks stream: those are read from the checkpoint as they run; and where weights
        are stored or held in blocks, which constants would have to be rounded into: they stay in norms and gates."""
        blocks = quantize.keeps_blocks(self.source, self.precision, self.skip_layers)
        return self.absorb and not blocks and not (self.streamed and self.device.type == "cpu")

    def unfolded(self) -> nn.Module:
        """The network as the checkpoint has it, on the meta device."""
        network: nn.Module = self.family.build(self.family.config.from_dict(self.source.config))
        return network

    def tables(
        self, unfolded: nn.Module, schedule: Schedule, seen: Callable[[str], None] | None = None
    ) -> dict[str, Tensor]:
        """The folded constants of `schedule`; `seen` is told each parameter that goes into them."""

        def read(name: str) -> Tensor:
            if seen is not None:
                seen(name)
            return self.source.get(name, dtype=torch.float32)

        return fold(unfolded, read, schedule)


@dataclass
class Program:
    """A compiled velocity network: `network(latents, modulation(step), context)` per evaluation.

    recipe: None for a program that was saved, which no longer has a checkpoint to go back to. constants: a key that
    stands for the tensors of the tables in use.
    """

    network: Any  # None only while another one is compiled
    schedule: tuple[tuple[float, float], ...]
    plan: Plan
    recipe: Recipe | None = None
    sequence: Ulysses | None = None
    constants: object = None
    _folded: ScheduleTables = field(default_factory=lambda: ScheduleTables(0, torch.device("cpu")))

    def parallelize(self, sequence: Ulysses) -> None:
        """Spreads each image's tokens over the processes of `sequence`, now and after every recompilation.

        Raises ConfigError for a family whose network does not split, or heads that do not divide."""
        if not hasattr(self.network, "sequence"):
            raise ConfigError(f"{self.plan.family} networks do not run sequence-parallel; Z-Image and Qwen-Image do")
        if self.sequence is not None:
            raise ConfigError("this pipeline is sequence-parallel already")
        sequence.require(self.network.config.dim // self.network.config.head_dim)
        self.sequence, self.network.sequence = sequence, sequence
        self.network.ops = replace(self.network.ops, attention=sequence.attention(self.network.ops.attention))

    def refold(self, schedule: Schedule) -> None:
        """Switches to another schedule: its tables are those it had before, or folded anew; absorbed weights are read
        anew.

        A program that has left one absorbed evaluation keeps tables from then on, so going back and forth reads the
        weights once. Raises ConfigError if the program came from a saved artifact, which holds one schedule only.
        """
        schedule = _checked(schedule)
        if schedule == self.schedule:
            return
        recipe = self._checkpoint(f"this artifact is folded for {_named(self.schedule)}; {_named(schedule)}")
        if self.network is None or self.plan.absorbed:
            return self._replace(recipe, schedule)
        device = next(self.network.parameters()).device
        self.schedule = ()  # until all tables are there: what stops in between is begun again by the next call
        folded = self._folded.get(schedule, lambda: recipe.tables(recipe.unfolded(), schedule))
        for name, table in folded.tables.items():
            assign(self.network, name, table.to(device))
        self._use(folded)
        self.network.folded_steps = len(schedule)
        self.schedule = schedule
        self.plan = replace(self.plan, schedule=schedule, bytes_after=parameter_bytes(self.network))

    def _use(self, folded: Folded) -> None:
        """Note that the network has these tables: their own tensors, unless they are kept on another device."""
        same = all(self.network.get_buffer(name) is table for name, table in folded.tables.items())
        self.constants = folded.key if same else object()

    def restore(self, schedule: Schedule) -> None:
        """Become what loading for `schedule` gives, whatever was run since: `refold`, with constants inside the weights
        again where loading puts them there."""
        self.refold(schedule)
        recipe, steps = self.recipe, len(self.schedule)
        if recipe is not None and not self.plan.absorbed:
            fresh = _folded(recipe.family, self.network.config, steps, recipe.absorbs)
            if _is_absorbed(fresh):
                self._replace(recipe, self.schedule)

    def set_loras(self, loras: Sequence[tuple[Path, float]], check_finite: bool = True) -> None:
        """Compiles again with these adapters, (path, weight) each, in place of those merged before.

        Weights come from the checkpoint, so nothing of an earlier adapter remains. check_finite: see `Merged`. Raises
        ConfigError for a saved artifact, CheckpointError for what cannot be merged (nothing has changed then).
        """
        recipe = self._checkpoint("this artifact's adapters are merged into its weights; changing them")
        base = recipe.source
        merged = Merged(base.folder, loras, check_finite, files=base.files, config=base.config)
        self._replace(replace(recipe, source=merged), self.plan.schedule)

    def _checkpoint(self, why: str) -> Recipe:
        if self.recipe is None:
            raise ConfigError(f"{why} needs the checkpoint: load the model folder instead, or save another artifact")
        return self.recipe

    def _replace(self, recipe: Recipe, schedule: Schedule) -> None:
        """Becomes what `recipe` gives. The old network goes first: a device may not hold two. Should
        compiling fail, the program is left without a schedule and the next `refold` compiles it."""
        self.network, self.schedule, self.recipe = None, (), recipe
        fresh = compile_network(recipe, schedule)
        self.network, self.schedule, self.plan = fresh.network, fresh.schedule, fresh.plan
        self.constants, self._folded = fresh.constants, fresh._folded
        if (sequence := self.sequence) is not None:
            self.sequence = None
            self.parallelize(sequence)


def compile_network(recipe: Recipe, schedule: Schedule, progress: Progress | None = None) -> Program:
    """Compiles a network for the (t, tt) pairs of `schedule` (1 to 100 of them); returns its program.

    progress(bytes) is called as tensors arrive. Raises CheckpointError for anything about the files, ConfigError for
    the schedule or the precision.
    """
    schedule, source, family = _checked(schedule), recipe.source, recipe.family
    device, dtype, precision, skip_layers = recipe.device, recipe.dtype, recipe.precision, recipe.skip_layers
    quantize.require(precision, device, dtype, skip_layers)
    source.meter.start()
    unfolded = recipe.unfolded()
    check(unfolded.state_dict(), source, family.layout)
    network = _folded(family, unfolded.config, len(schedule), recipe.absorbs)
    quantize.check_names(network, skip_layers, recipe.sensitivity)
    expected = network.state_dict()
    into: set[str] = set()
    reader = Reader(expected, source, family.layout, device, dtype)
    streaming = Streaming(network, recipe.streamed, reader, precision, skip_layers)
    tables = recipe.tables(unfolded, schedule, into.add)
    tensors = _tensors(reader, network, tables, streaming)
    read_into(streaming.take, tensors, source.meter, progress)
    layers = quantize.convert_layers(network, device, precision, skip_layers)
    network.eval()
    streaming.start()
    choices = _select(network, device, dtype, recipe.fp8_attention)
    report = source.meter.report(len(expected), source.total_bytes())
    away = folded_away(unfolded, network)
    folded, pruned = (group_parameters({k: n for k, n in away.items() if (k in into) is yes}) for yes in (True, False))
    before = sum(p.numel() for p in unfolded.parameters())
    plan = Plan(
        family=family.name, source=(source.folder.parent if source.files is None else source.paths[0]).name,
        device=str(device), dtype=dtype_name(dtype), schedule=schedule, choices=choices, parameters_before=before,
        parameters_after=before - sum(away.values()), bytes_before=before * dtype.itemsize,
        bytes_after=parameter_bytes(network), folded=folded, pruned=pruned,
        absorbed=_is_absorbed(network), loras=source.loras, precision=precision, skip_layers=skip_layers, layers=layers,
        fp8_attention=recipe.fp8_attention, sensitivity=recipe.sensitivity,
        notes=(
            f"transformer {report}", *recipe.notes, *source.notes,
            *quantize.dtype_notes(source.main_dtype(), dtype, device),
        ),
    )  # fmt: skip
    home = torch.device("cpu") if recipe.tables_on_host else device
    program = Program(network, schedule, plan, recipe, _folded=ScheduleTables(recipe.tables_bytes, home))
    if not plan.absorbed:
        program._use(program._folded.get(schedule, lambda: {name: network.get_buffer(name) for name in tables}))
    return program


def load_program(
    saved: Checkpoint, family: Family, plan: Plan, *, device: torch.device, dtype: torch.dtype,
    progress: Progress | None = None,
) -> Program:  # fmt: skip
    """The program of a saved artifact: no pass runs again, ops are selected for this machine."""
    config = family.config.from_dict(saved.config)
    network = _folded(family, config, len(plan.schedule), plan.absorbed)
    with meta_device():
        original = family.network(config).state_dict()
    tables = {name for name, _ in network.named_buffers() if name not in original}

    def dtype_of(name: str, kind: torch.dtype) -> torch.dtype | None:
        if name in as_saved:
            return None
        return torch.float32 if name in tables else family.layout.dtype_of(name, kind)

    as_saved = quantize.expect_quantized(network, saved, plan.precision, plan.skip_layers)
    report = materialize(network, saved, Layout(dtype_of=dtype_of), device, dtype, progress)
    quantize.check_quantized(network, device, dtype, plan.precision)
    layers = quantize.convert_layers(network, device)
    choices = _select(network, device, dtype, plan.fp8_attention)
    notes = (f"compiled for {plan.dtype} on {plan.device} and saved", f"transformer {report}")
    plan = replace(plan, device=str(device), dtype=dtype_name(dtype), choices=choices, layers=layers, notes=notes)
    return Program(network, plan.schedule, plan)


def _folded(family: Family, config: Any, steps: int, absorb: bool) -> Any:
    """The compiled layout on the meta device, without constants of its own where they can be absorbed."""
    absorbed = {"absorbed": True} if absorb and steps == 1 and hasattr(family.network, "absorptions") else {}
    with meta_device():
        return family.network(config, folded_steps=steps, **absorbed)


def _tensors(
    reader: Reader, network: Any, tables: Mapping[str, Tensor], streaming: Streaming
) -> Iterator[tuple[str, Tensor | Int4Weight]]:
    """Yield (name, tensor) of the compiled `network` for every tensor but those that stay in files, made one at a
    time: with constants of `tables` inside, from `tables`, or as `streaming` reads it."""
    done = set()
    if _is_absorbed(network):
        read = partial(reader.tensor, dtype=torch.float32)
        for name, tensor in folding.absorb(network.absorptions(), tables, read):
            done.add(name)
            tensor = tensor.to(reader.layout.dtype_of(name, reader.dtype))
            yield name, tensor
            del tensor  # before the next one is read
    for name in reader.expected:
        if name in tables:
            yield name, tables[name].to(reader.device)
        elif name not in done and name not in streaming.in_files:
            yield name, streaming.read(name)


def _select(network: Any, device: torch.device, dtype: torch.dtype, fp8_attention: bool) -> tuple[Choice, ...]:
    """Gives the network and its quantized layers their implementations."""
    target = replace(Target.of_network(network.config, device, dtype), fp8_attention=fp8_attention)
    network.ops, choices = select(target)
    return choices + quantize.bind_quantized(network, target)


def _is_absorbed(network: nn.Module) -> bool:
    return getattr(network, "absorbed", False)


def _checked(schedule: Schedule) -> tuple[tuple[float, float], ...]:
    if not 1 <= len(schedule) <= MAX_EVALUATIONS:
        raise ConfigError(f"a schedule of {len(schedule)} evaluations cannot be folded; use 1 to {MAX_EVALUATIONS}")
    return tuple(schedule)


def _named(schedule: Schedule) -> str:
    return f"{len(schedule)} evaluation(s) at (t, tt) = " + ", ".join(f"({t:g}, {tt:g})" for t, tt in schedule)
