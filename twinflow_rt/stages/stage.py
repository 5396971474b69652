"""What stages share: networks of a model folder, declared first, read when wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import OWN_FILES, Checkpoint, Files
from ..checkpoint.fuse import sources
from ..checkpoint.layout import Layout
from ..checkpoint.load_report import LoadReport
from ..checkpoint.reading import Progress
from ..errors import ConfigError
from ..models.architecture import Architecture
from ..models.meta_device import meta_device
from ..ops import EAGER, OpTable, Target, select
from ..passes import quantize
from ..passes.blocks import block_names
from ..passes.convolutions import fold_upsampling
from ..passes.layer_groups import Layers
from ..passes.layers import KINDS
from ..runtime.capture import Captures
from ..runtime.streaming import NOT_RECORDED, load_part
from ..runtime.timing import StageTimer


@dataclass(frozen=True)
class StageOptions:
    """How a stage is read and run.

    captures: records its work per shape (`runtime.capture`), or None. streams: whether the blocks of its networks come
    and go as they run (`runtime.streaming`). precision: the kind of the linear layers of its repeated blocks
    (`passes.layers.KINDS`), or None; skip_layers: parts of names of layers kept out of that. tile: side in pixels of
    the tiles that a VAE decodes larger images in (`tiles`); None: images whole.
    """

    captures: Captures | None = None
    streams: bool = False
    precision: str | None = None
    skip_layers: tuple[str, ...] = ()
    tile: int | None = None


DEFAULTS = StageOptions()


@dataclass(frozen=True)
class Part:
    """One network of a stage: the folder it has, its files, and how they are read."""

    name: str
    checkpoint: Checkpoint
    network: Any  # an nn.Module with `config` and `ops`
    layout: Layout

    def load(
        self, device: torch.device, dtype: torch.dtype, options: StageOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> tuple[LoadReport, tuple[Layers, ...]]:  # fmt: skip
        """Read the weights; return what that took and what linear layers became. Blocks that stream are not read: they
        come as they run."""
        precision, skip = options.precision, options.skip_layers
        streamed = len(block_names(self.network)) if options.streams else 0
        report = load_part(self, streamed, device, dtype, progress, precision, skip)
        return report, quantize.convert_layers(self.network, device, precision, skip)

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors in use under the checkpoint's names, merged ones cut as the files have them."""
        out: dict[str, Tensor] = {}
        for name, tensor in self.network.state_dict().items():
            names = sources(name, self.layout.fused)
            sizes = [self.checkpoint.shape(n)[0] for n in names] if len(names) > 1 else [len(tensor)]
            out.update(zip(names, tensor.split(sizes) if len(names) > 1 else (tensor,), strict=True))
        return out

    def meta_network(self, ops: OpTable = EAGER) -> Any:
        """Return the same network without weights, on the meta device, for counting. ops: which run there."""
        with meta_device():
            network = type(self.network)(self.network.config)
        network.ops = ops
        return network


def open_part(folder: Path, model: Architecture, files: Files = OWN_FILES) -> Part:
    """Return the network of `folder`, which must be of this architecture, not yet read. files: in place of the
    folder's, where they have it. Raises CheckpointError, ConfigError."""
    checkpoint = model.read.of_part(folder, files, strip=model.strip)
    network, layout = model.declare(checkpoint.config, str(folder / "config.json"))
    checkpoint.name_tied(layout.tied)
    return Part(folder.name, checkpoint, network, layout)


class Stage:
    """A stage made of `parts`. The constructor takes the model folder and reads headers only; until
    `materialize` every network is on the meta device.

    options: how the stage is read and run; `captures` and `tile` may be exchanged between calls. reports, layers: what
    reading took and what linear layers became, part by part.
    """

    parts: tuple[Part, ...]
    options: StageOptions = DEFAULTS
    reports: tuple[LoadReport, ...] = ()
    ops: OpTable = EAGER
    layers: tuple[tuple[Layers, ...], ...] = ()

    def materialize(
        self, device: torch.device, dtype: torch.dtype, options: StageOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Read all parts and give them the ops of `device`."""
        self.options = options
        loaded = [part.load(device, dtype, options, progress) for part in self.parts]
        self.reports, self.layers = tuple(report for report, _ in loaded), tuple(layers for _, layers in loaded)
        target = Target.of(device, dtype)
        self.ops, choices = select(target)
        for part in self.parts:
            part.network.ops = self.ops
            quantize.bind_quantized(part.network, target)
            fold_upsampling(part.network, choices)

    def require_precision(
        self, precision: str | None, skip_layers: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Raise ConfigError where `device` cannot multiply linear layers of this precision, and for names in
        `skip_layers` that no layer has."""
        if precision not in (None, *KINDS):
            names = ", ".join(KINDS)
            raise ConfigError(f"text_precision {precision!r:.40} is none of {names}; None keeps the dtype")
        if skip_layers and precision is None:
            raise ConfigError("text_skip_layers names layers kept out of text_precision: give one")
        quantize.require(precision, device, dtype, skip_layers)
        quantize.check_names(nn.ModuleDict({part.name: part.network for part in self.parts}), skip_layers)

    def notes(self) -> tuple[str, ...]:
        """Return lines for a plan: what loading took, and what linear layers became where some have 8 bits."""
        lines = [f"{part.name} {report}" for part, report in zip(self.parts, self.reports, strict=True)]
        if self.options.precision is None:
            small = "files are quantized, and read dense; text_precision='int4' keeps them small"
            lines += [f"{part.name} {small}" for part in self.parts if part.checkpoint.has_blocks]
        else:
            each = zip(self.parts, self.layers, strict=True)
            lines += [f"{part.name} linear {group}" for part, groups in each for group in groups]
        return tuple(lines)

    def meta_networks(self, ops: OpTable = EAGER) -> list[Any]:
        """Return `Part.meta_network` of every part."""
        return [part.meta_network(ops) for part in self.parts]

    def captured(self, name: str, run: Callable[..., Any], *args: Any, owner: Any = None) -> Any:
        """Return run(*args), by a recording where there is one. owner: what else but the weights the recording reads,
        if anything."""
        captures, streams = self.options.captures, self.options.streams
        if captures is None:
            return run(*args)
        if streams:
            captures.refuse(name, NOT_RECORDED)
            return run(*args)
        return captures(name, self.reports if owner is None else owner, run, *args)


def in_parts(function: Callable[[Tensor, int], Tensor], x: Tensor, at_once: int, timer: StageTimer) -> Tensor:
    """Return function(part, its number) for parts of `at_once` images of x, joined; the caller can cancel between
    parts."""
    results = []
    for i, part in enumerate(x.split(at_once)):
        if i:
            timer.check(f"after {i * at_once} of {len(x)} images of a stage")
        results.append(function(part, i))
    return results[0] if len(results) == 1 else torch.cat(results)
