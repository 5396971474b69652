"""What the text and the image stage share: networks of a model folder, declared first, read when wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.fuse import sources
from ..checkpoint.layout import Layout
from ..checkpoint.load_report import LoadReport
from ..checkpoint.reading import Progress
from ..errors import ConfigError
from ..models.architecture import Architecture
from ..ops import EAGER
from ..ops.selection import OpTable, Target, select
from ..passes import quantize
from ..passes.blocks import block_names
from ..passes.layer_groups import Layers
from ..passes.upsample import fold_upsampling
from ..runtime.capture import Captures
from ..runtime.streaming import NOT_RECORDED, load_part


@dataclass(frozen=True)
class Part:
    """One network of a stage: the folder it has, its files, and how they are read."""

    name: str
    checkpoint: Checkpoint
    network: Any  # an nn.Module with `config` and `ops`
    layout: Layout

    def load(
        self, device: torch.device, dtype: torch.dtype, progress: Progress | None = None, *, streams: bool = False,
        precision: str | None = None, exempt: Sequence[str] = (),
    ) -> tuple[LoadReport, tuple[Layers, ...]]:  # fmt: skip
        """Reads the weights and says what linear layers became. streams: without those of repeated blocks, which come
        as they run (see `streaming`). precision, exempt: see `passes.quantize.convert`."""
        streamed = len(block_names(self.network)) if streams else 0
        report = load_part(self, streamed, device, dtype, progress, precision, exempt)
        return report, quantize.convert(self.network, device, precision, exempt)

    def weights(self) -> dict[str, Tensor]:
        """The tensors in use under the checkpoint's names, merged ones cut as the files have them."""
        out: dict[str, Tensor] = {}
        for name, tensor in self.network.state_dict().items():
            names = sources(name, self.layout.fused)
            rows = [self.checkpoint.shape(n)[0] for n in names] if len(names) > 1 else [len(tensor)]
            out.update(zip(names, tensor.split(rows) if len(names) > 1 else (tensor,), strict=True))
        return out

    def shadow(self, ops: OpTable = EAGER) -> Any:
        """The same network without weights, for counting; ops: which run on the meta device."""
        with torch.device("meta"):
            network = type(self.network)(self.network.config)
        network.ops = ops
        return network


def open_part(folder: Path, model: Architecture) -> Part:
    """Return the network of `folder`, which must be of this architecture, not yet read. Raises CheckpointError,
    ConfigError."""
    checkpoint = model.read(folder, strip=model.strip)
    return Part(folder.name, checkpoint, *model.declare(checkpoint.config, str(folder / "config.json")))


class Stage:
    """A stage made of `parts`. The constructor takes the model folder and reads headers only; until
    `materialize` every network is on the meta device.

    captures: what records the stage's work per shape (see `capture`), or None. streams: whether the blocks of
    its networks come and go as they run (see `streaming`). precision, exempt: "int8" or "fp8" for the linear layers
    of its repeated blocks, but for those with such names. All three are to be set before `materialize`.
    layers: what linear layers became, part by part.
    """

    parts: tuple[Part, ...]
    reports: tuple[LoadReport, ...] = ()
    ops: OpTable = EAGER
    captures: Captures | None = None
    streams: bool = False
    precision: str | None = None
    exempt: tuple[str, ...] = ()
    layers: tuple[tuple[Layers, ...], ...] = ()

    def __init__(self, folder: Path) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype, progress: Progress | None = None) -> Self:
        """The stage of a model folder, ready to run."""
        stage = cls(folder)
        stage.materialize(device, dtype, progress)
        return stage

    def materialize(self, device: torch.device, dtype: torch.dtype, progress: Progress | None = None) -> None:
        """Reads all parts and gives them the ops of `device`; `reports` tells what reading took, part by part."""
        how: dict[str, Any] = {"streams": self.streams, "precision": self.precision, "exempt": self.exempt}
        loaded = [part.load(device, dtype, progress, **how) for part in self.parts]
        self.reports, self.layers = tuple(report for report, _ in loaded), tuple(layers for _, layers in loaded)
        target = Target.of(device, dtype)
        self.ops, choices = select(target)
        for part in self.parts:
            part.network.ops = self.ops
            quantize.attach(part.network, target)
            fold_upsampling(part.network, choices)

    def quantize(self, precision: str | None, exempt: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """Has the linear layers of repeated blocks quantized as they are read; to be called before `materialize`.
        Raises ConfigError where `device` cannot multiply them, and for names in `exempt` that no layer has."""
        if precision not in (None, *quantize.ROWS):
            names = ", ".join(quantize.ROWS)
            raise ConfigError(f"text_precision {precision!r:.40} is none of {names}; None keeps the dtype")
        if exempt and precision is None:
            raise ConfigError("text_skip_layers names layers kept out of text_precision: give one")
        quantize.require(precision, device, dtype)
        quantize.check_names(nn.ModuleDict({part.name: part.network for part in self.parts}), exempt)
        self.precision, self.exempt = precision, tuple(exempt)

    def notes(self) -> tuple[str, ...]:
        """Lines for a plan: what loading took, and what linear layers became where some have 8 bits."""
        lines = [f"{part.name} {report}" for part, report in zip(self.parts, self.reports, strict=True)]
        if self.precision is not None:
            each = zip(self.parts, self.layers, strict=True)
            lines += [f"{part.name} linear {group}" for part, groups in each for group in groups]
        return tuple(lines)

    def shadows(self, ops: OpTable = EAGER) -> list[Any]:
        """`Part.shadow` of every part."""
        return [part.shadow(ops) for part in self.parts]

    def captured(self, name: str, run: Callable[..., Any], *args: Any, owner: Any = None) -> Any:
        """run(*args), by a graph where there are any. owner: what else but the weights the graph reads, if anything."""
        if self.captures is None:
            return run(*args)
        if self.streams:
            self.captures.refuse(name, NOT_RECORDED)
            return run(*args)
        return self.captures(name, self.reports if owner is None else owner, run, *args)
