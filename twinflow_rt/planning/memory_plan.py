"""What a model will hold and need, before any of it is loaded; and how to make it fit a budget.

    peak = the weights that stay + the block or two that stream + the largest of the stages' work

`memory_costs` counts both. Bytes are device memory on a GPU. On a CPU they are the process's anonymous memory above
where it stood: weights used as they lie in their mapped files are the system's to drop and are not counted.

Where that exceeds the budget, cheaper measures come first: decoding in tiles costs next to nothing, a text
encoder that streams costs reading it once per new prompt, blocks of the network that stream cost reading them
once per evaluation, so no more of them do than have to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import Layout
from ..errors import ConfigError
from ..host_memory import return_freed_memory
from ..passes.quantize import keeps_blocks
from ..stages.stage import DEFAULTS, StageOptions
from ..stages.text import TextStage
from ..stages.vae import VaeDecoder
from .memory_costs import Costs, Network, costs_of

PROMPT_TOKENS = 2048  # that a budget plans for, and then the longest: OpenUni alone reads more
TILES = (1024, 768, 512, 384, 256, 192, 128, 64)  # sides in pixels to try, largest first


@dataclass(frozen=True)
class MemoryPlan:
    """How a model is held. budget: bytes, or None: no limit. largest: height, width and images of the largest
    call planned for. text_streams: whether the text encoder's blocks stream; streamed: how many of the network's
    do, of `blocks`. tile: side of the decoder's tiles in pixels, or None. weights: bytes held per stage;
    work: bytes that each stage needs besides while it runs."""

    budget: int | None
    largest: tuple[int, int, int]
    text_streams: bool = False
    streamed: int = 0
    blocks: int = 0
    tile: int | None = None
    weights: Mapping[str, int] = field(default_factory=dict)
    work: Mapping[str, int] = field(default_factory=dict)

    def require(self, height: int, width: int, images: int) -> None:
        """Raise ConfigError for a call that is larger than what was planned for."""
        if self.budget is not None and height * width * images > (most := math.prod(self.largest)):
            raise ConfigError(
                f"{images} x {width}x{height} exceeds the {self.largest[2]} x {self.largest[1]}x{self.largest[0]} "
                f"({most} pixels) that memory_budget was planned for; generate fewer at a time or smaller ones, or "
                "load with a larger `largest`"
            )

    @property
    def stages(self) -> dict[str, int]:
        """Predicted peak while each stage runs."""
        held = sum(self.weights.values())
        return {name: held + size for name, size in self.work.items()}

    @property
    def peak(self) -> int:
        """Predicted bytes at the peak of the largest call."""
        return max(self.stages.values())

    @property
    def graphs(self) -> int:
        """Bytes that the budget leaves for graphs, whose pool stays while other stages run."""
        return 0 if self.budget is None else self.budget - self.peak

    def unrecorded(self) -> dict[str, str]:
        """Return why stages are not recorded whose graph would need more than `graphs`: what a stage works in."""
        left = f"its graph would hold {{}}, and memory_budget leaves {mega(self.graphs)}"
        return {name: left.format(mega(size)) for name, size in self.work.items() if size > self.graphs}

    def notes(self) -> tuple[str, ...]:
        """Return lines for a plan."""
        height, width, images = self.largest
        limit = "no limit" if self.budget is None else f"budget {mega(self.budget)}"
        held = ", ".join(f"{name} {mega(size)}" for name, size in self.weights.items())
        work = ", ".join(f"{name} {mega(size)}" for name, size in self.stages.items())
        how = "text encoder streams by block" if self.text_streams else "text encoder stays"
        network = f"{self.streamed} of {self.blocks} blocks stream" if self.streamed else "network stays"
        decode = "decoded whole" if self.tile is None else f"decoded in tiles of {self.tile} pixels"
        return (
            f"memory: predicted peak {mega(self.peak)} for {images} x {width}x{height}, {limit}; "
            f"{how}, {network}, {decode}",
            f"memory: weights held: {held}; peak in each stage: {work}",
        )


def choose(
    costs: Costs, budget: int | None, largest: tuple[int, int, int], tile: int | None = None
) -> MemoryPlan:
    """Return the first plan of least slowdown that fits `budget`; a pure function. tile: the decoder's, if that is
    settled. Raises ConfigError if no plan fits, with the least that would."""
    least = None
    for text_streams, streamed, side in _candidates(costs, tile):
        plan = _planned(costs, budget, largest, text_streams, streamed, side)
        if budget is None or plan.peak <= budget:
            return plan
        least = plan.peak if least is None else min(least, plan.peak)
    assert budget is not None and least is not None
    raise ConfigError(
        f"memory_budget {mega(budget)} is too small for this model: with everything streamed and in tiles it needs "
        f"{mega(least)} for {largest[2]} x {largest[1]}x{largest[0]}; give more, or a smaller `largest`"
    )


def _candidates(costs: Costs, tile: int | None) -> Iterator[tuple[bool, int, int | None]]:
    """Yield (text streams, network blocks streamed, tile), least slowdown first."""
    sides: list[int | None] = [None, *(t for t in TILES if t > costs.least_tile), costs.least_tile]
    sides = sides if tile is None else [tile]
    texts = [False, True] if costs.weights["text"].blocks else [False]
    for text in texts:
        for side in sides:
            yield text, 0, side
    for streamed in range(1, len(costs.weights["network"].blocks) + 1):
        for side in sides:
            yield texts[-1], streamed, side


def _planned(
    costs: Costs, budget: int | None, largest: tuple[int, int, int], text_streams: bool, streamed: int, tile: int | None
) -> MemoryPlan:  # fmt: skip
    text, network = costs.weights["text"], costs.weights["network"]
    weights = {
        "text": text.held(len(text.blocks) if text_streams else 0, costs.slots),
        "network": network.held(streamed, costs.slots),
        "vae": costs.weights["vae"].held(0, costs.slots),
    }
    work = {
        "text": max(costs.text, text.making if text_streams else 0),
        "sample": costs.context + max(costs.velocity, network.making),
        "decode": costs.context + costs.decode(tile),
    }
    return MemoryPlan(budget, largest, text_streams, streamed, len(network.blocks), tile, weights, work)


def plan_memory(
    text: TextStage, vae: VaeDecoder, checkpoint: Checkpoint, family: Any, times: Sequence[tuple[float, float]],
    device: torch.device, dtype: torch.dtype, budget: int, largest: tuple[int, int, int], tile: int | None = None, *,
    precision: str | None = None, skip_layers: Sequence[str] = (), saved: bool = False,
    text_options: StageOptions = DEFAULTS, guided: bool = False,
) -> MemoryPlan:  # fmt: skip
    """Return the plan for a model of `family` that is open but not read; see `choose`.

    precision, skip_layers: of its linear layers, see `passes.quantize.convert_layers`. saved: `checkpoint` is a
    compiled program's, whose network does not stream. text_options, guided: see
    `costs_of`. Raises ConfigError if `budget` is too small."""
    module = family.build(family.config.from_dict(checkpoint.config), folded_steps=len(times))
    layout = Layout(dtype_of=family.layout.dtype_of) if saved else family.layout
    absorb = not saved and len(times) == 1 and hasattr(family.network, "absorptions")
    absorb = absorb and not keeps_blocks(checkpoint, precision, skip_layers)
    network = Network(
        module, checkpoint, layout, streams=not saved, absorb=absorb, precision=precision, skip_layers=skip_layers
    )  # fmt: skip
    costs = costs_of(
        text, vae, network, device=device, dtype=dtype, largest=largest, text_options=text_options, guided=guided
    )  # fmt: skip
    if device.type == "cpu":
        return_freed_memory()
    return choose(costs, budget, largest, tile)


def mega(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
