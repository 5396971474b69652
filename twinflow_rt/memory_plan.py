"""What a model will hold and need, before any of it is loaded; and how to make it fit a budget.

    peak = the weights that stay + the block or two that stream + the largest of the stages' work

The weights are counted from headers, the work by running each stage on the meta device (`footprint`). Bytes are
device memory on a GPU. On a CPU they are the process's anonymous memory above where it stood: weights used as
they lie in their mapped files are the system's to drop and are not counted.

Where that exceeds the budget, cheaper measures come first: decoding in tiles costs next to nothing, a text
encoder that streams costs reading it once per new prompt, blocks of the network that stream cost reading them
once per evaluation, so no more of them do than have to.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import tiles
from .errors import ConfigError
from .footprint import peak_bytes
from .ops.select import Target, select
from .passes.blocks import block_names, parameters_of
from .passes.fuse import sources
from .passes.load import Checkpoint, Layout
from .passes.upsample import folded_bytes
from .prompt_cache import context_bytes

TILES = (1024, 768, 512, 384, 256, 192, 128, 64)  # sides in pixels to try, largest first
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
MMAP_THRESHOLD = 1 << 20  # bytes
_M_MMAP_THRESHOLD = -3  # glibc's name of that option


@dataclass(frozen=True)
class Weights:
    """Bytes of one stage's weights: what stays in any case, each block that could stream, in order, and what
    each of these needs while it streams (on a CPU less: what is used as its file has it takes no room)."""

    fixed: int
    blocks: tuple[int, ...] = ()
    passing: tuple[int, ...] = ()

    def held(self, streamed: int, slots: int) -> int:
        """Bytes resident while the last `streamed` blocks go through `slots` buffers."""
        if not streamed:
            return self.fixed + sum(self.blocks)
        first = len(self.blocks) - streamed
        return self.fixed + sum(self.blocks[:first]) + min(slots, streamed) * max(self.passing[first:])


@dataclass(frozen=True)
class Costs:
    """weights: per stage (text, network, vae). text, velocity: bytes that a call of the stage works in;
    decode(tile): likewise, in tiles of that side or (None) whole. context: what is kept of the prompts meanwhile.
    least_tile: the VAE's, in pixels. slots: blocks in memory while blocks stream."""

    weights: Mapping[str, Weights]
    text: int
    context: int
    velocity: int
    decode: Callable[[int | None], int]
    least_tile: int
    slots: int


@dataclass(frozen=True)
class MemoryPlan:
    """How a model is held. budget: bytes, or None: no limit. largest: height, width and images of the largest
    call planned for. text_streams: whether the text encoder's blocks stream; streamed: how many of the network's
    do, of `blocks`. tile: side of the decoder's tiles in pixels, or None. weights: bytes held per stage;
    stages: predicted peak while each runs."""

    budget: int | None
    largest: tuple[int, int, int]
    text_streams: bool = False
    streamed: int = 0
    blocks: int = 0
    tile: int | None = None
    weights: Mapping[str, int] = field(default_factory=dict)
    stages: Mapping[str, int] = field(default_factory=dict)

    def require(self, height: int, width: int, images: int) -> None:
        """Raises ConfigError for a call that is larger than what was planned for."""
        if self.budget is not None and height * width * images > (most := math.prod(self.largest)):
            raise ConfigError(
                f"{images} x {width}x{height} exceeds the {self.largest[2]} x {self.largest[1]}x{self.largest[0]} "
                f"({most} pixels) that memory_budget was planned for; generate fewer at a time or smaller ones, or "
                "load with a larger `largest`"
            )

    @property
    def peak(self) -> int:
        """Predicted bytes at the peak of the largest call."""
        return max(self.stages.values())

    def notes(self) -> tuple[str, ...]:
        """Lines for a plan."""
        height, width, images = self.largest
        limit = "no limit" if self.budget is None else f"budget {_mega(self.budget)}"
        held = ", ".join(f"{name} {_mega(size)}" for name, size in self.weights.items())
        work = ", ".join(f"{name} {_mega(size)}" for name, size in self.stages.items())
        how = "text encoder streams by block" if self.text_streams else "text encoder stays"
        network = f"{self.streamed} of {self.blocks} blocks stream" if self.streamed else "network stays"
        decode = "decoded whole" if self.tile is None else f"decoded in tiles of {self.tile} pixels"
        return (
            f"memory: predicted peak {_mega(self.peak)} for {images} x {width}x{height}, {limit}; "
            f"{how}, {network}, {decode}",
            f"memory: weights held: {held}; peak in each stage: {work}",
        )


def settled(weights: Weights) -> Weights:
    """The same where no block can stream."""
    return Weights(weights.fixed + sum(weights.blocks))


def choose(
    costs: Costs, budget: int | None, largest: tuple[int, int, int], tile: int | None = None
) -> MemoryPlan:
    """The first plan of least slowdown that fits `budget`; a pure function. tile: the decoder's, if that is
    settled. Raises ConfigError if no plan fits, with the least that would."""
    least = None
    for text_streams, streamed, side in _candidates(costs, tile):
        plan = _planned(costs, budget, largest, text_streams, streamed, side)
        if budget is None or plan.peak <= budget:
            return plan
        least = plan.peak if least is None else min(least, plan.peak)
    assert budget is not None and least is not None
    raise ConfigError(
        f"memory_budget {_mega(budget)} is too small for this model: with everything streamed and in tiles it needs "
        f"{_mega(least)} for {largest[2]} x {largest[1]}x{largest[0]}; give more, or a smaller `largest`"
    )


def _candidates(costs: Costs, tile: int | None) -> Iterator[tuple[bool, int, int | None]]:
    """(text streams, network blocks streamed, tile), least slowdown first."""
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
    held = sum(weights.values())
    work = {"text": costs.text, "sample": costs.context + costs.velocity, "decode": costs.context + costs.decode(tile)}
    stages = {name: held + size for name, size in work.items()}
    return MemoryPlan(budget, largest, text_streams, streamed, len(network.blocks), tile, weights, stages)


def costs_of(
    text: Any, vae: Any, checkpoint: Checkpoint, layout: Layout, network: Any, *, device: torch.device,
    dtype: torch.dtype, largest: tuple[int, int, int], absorb: bool = False, quantized: Sequence[str] | None = None,
) -> Costs:  # fmt: skip
    """Counts a model whose stages are open but not read, and whose folded `network` is on the meta device.

    absorb: whether constants go into the network's weights, which then are no file's any more. quantized: None,
    or parts of names that are exempt where the linear layers of blocks have 8 bits; these do not stream.
    """
    height, width, images = largest
    ops, _ = select(Target.of(torch.device("cpu"), torch.float32))  # which run on the meta device, too
    ratio = dtype.itemsize / torch.float32.itemsize  # the shadows are float32
    parts = {"text": text.parts, "vae": vae.parts}
    of_text = tuple(text.exempt) if text.precision else None
    weights = {
        name: _total(
            _weights(
                p.network, p.checkpoint, p.layout, device, dtype, name == "vae",
                quantized=of_text if name == "text" else None,
            )
            for p in several
        )
        for name, several in parts.items()
    }  # fmt: skip
    if of_text is not None:
        weights["text"] = settled(weights["text"])
    weights["network"] = _weights(network, checkpoint, layout, device, dtype, False, absorb, quantized)
    if quantized is not None:
        weights["network"] = settled(weights["network"])
    with torch.device("meta"):
        shadow = type(network)(network.config, folded_steps=1)
        latents = torch.zeros(images, vae.channels, height // vae.scale, width // vae.scale)
    shadow.ops = ops
    with torch.inference_mode():
        text_work = peak_bytes(lambda: text.probe(text.max_tokens, ops))
        prompt = text.probe(text.max_tokens)
        context_work = peak_bytes(lambda: shadow.encode_context(prompt.embeds, prompt.lengths, **prompt.extras))
        context = shadow.encode_context(prompt.embeds, prompt.lengths, **prompt.extras).select([0] * images)
    velocity = peak_bytes(lambda: shadow(latents, shadow.step_modulation(0), context))
    text_work = max(text_work, prompt.embeds.nbytes + context_work)
    decoder = vae.parts[0].shadow(ops)
    image = 4 * images * 3 * height * width
    # beside what the network makes: the float image becomes bytes in float32 (see ops.decode.to_uint8)
    kept: dict[int | None, int] = {}

    def decode(tile: int | None) -> int:
        if tile not in kept:
            kept[tile] = round(ratio * _decode(decoder, latents, tile, image))
        return kept[tile]

    return Costs(
        weights, round(ratio * text_work), round(ratio * context_bytes(context)), round(ratio * velocity), decode,
        tiles.smallest(decoder), slots=1 if device.type == "cpu" else 2,
    )  # fmt: skip


def _decode(decoder: Any, latents: Tensor, tile: int | None, image: int) -> int:
    """Float32 bytes that decoding works in; image: bytes of the result."""
    if tile is None:
        return peak_bytes(lambda: decoder(latents))
    one = latents[:1]
    with torch.inference_mode():
        features: Tensor = decoder.trunk(one)
    size, far = tiles.cell(decoder), tiles.margin(decoder)
    sides = [min(n, -(-n // -(-n // max(tile // size, 1))) + 2 * far) for n in features.shape[2:]]
    part = features.new_empty((1, features.shape[1], *sides))
    tail = peak_bytes(lambda: decoder.tail(part)) + part.nbytes
    both = 2 * image if len(latents) > 1 else image  # images are put together at the end
    return max(peak_bytes(lambda: decoder.trunk(one)), features.nbytes + both + tail)


def _total(several: Iterator[Weights]) -> Weights:
    total = Weights(0)
    for w in several:
        total = Weights(total.fixed + w.fixed, total.blocks + w.blocks, total.passing + w.passing)
    return total


def _weights(
    network: nn.Module, checkpoint: Checkpoint, layout: Layout, device: torch.device, dtype: torch.dtype,
    channels_last: bool, absorb: bool = False, quantized: Sequence[str] | None = None,
) -> Weights:  # fmt: skip
    """Bytes of a network's tensors on the device. On a CPU a tensor that is used as its file has it takes none."""
    known: set[str] = set(checkpoint)
    tensors: dict[str, Tensor] = network.state_dict()
    linears = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.Linear)}

    def size(name: str, streams: bool = False) -> int:
        tensor, parts = tensors[name], sources(name, layout.fused)
        made = not all(part in known for part in parts)  # a folded table
        wanted = torch.float32 if made else layout.dtype_of(name, dtype) or checkpoint.dtype(parts[0])
        moved = made or len(parts) > 1 or checkpoint.dtype(parts[0]) != wanted
        if not streams:
            moved = moved or absorb or name in linears or (channels_last and tensor.ndim == 4)
        if device.type == "cpu" and not moved:
            return 0
        if name in streaming and name in linears and narrow(name):
            return tensor.numel() + 4 * len(tensor)  # 8 bits and a scale per row
        return tensor.numel() * wanted.itemsize

    def narrow(name: str) -> bool:
        saved = name in known and checkpoint.dtype(name).itemsize == 1
        return saved or (quantized is not None and not any(part in name for part in quantized))

    blocks = [parameters_of(network, block) for block in block_names(network)]
    streaming = {name for names in blocks for name in names}
    fixed = sum(size(name) for name in tensors if name not in streaming) + folded_bytes(network, dtype)
    kept, passing = (tuple(sum(size(n, streams) for n in names) for names in blocks) for streams in (False, True))
    return Weights(fixed, kept, passing)


def plan_memory(
    text: Any, vae: Any, checkpoint: Checkpoint, family: Any, times: Sequence[tuple[float, float]],
    device: torch.device, dtype: torch.dtype, budget: int, largest: tuple[int, int, int], tile: int | None = None, *,
    quantized: str | None = None, exempt: Sequence[str] = (), saved: bool = False,
) -> MemoryPlan:  # fmt: skip
    """The plan for a model of `family` that is open but not read; see `choose`. saved: `checkpoint` is a
    compiled program's, whose network does not stream. Raises ConfigError if `budget` is too small."""
    with torch.device("meta"):
        network = family.network(family.config.from_dict(checkpoint.config), folded_steps=len(times))
    layout = Layout(dtype_of=family.layout.dtype_of) if saved else family.layout
    absorb = not saved and len(times) == 1 and hasattr(family.network, "absorptions")
    costs = costs_of(
        text, vae, checkpoint, layout, network, device=device, dtype=dtype, largest=largest, absorb=absorb,
        quantized=tuple(exempt) if quantized else None,
    )  # fmt: skip
    if saved:
        costs = replace(costs, weights={**costs.weights, "network": settled(costs.weights["network"])})
    if device.type == "cpu":
        return_freed_memory()
    return choose(costs, budget, largest, tile)


def parse_bytes(value: int | str | None, what: str = "memory_budget") -> int | None:
    """Bytes of an int or of text such as "12GB", "900 MiB"; None stays None. Raises ConfigError for others."""
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip().lower()
        number = text.rstrip("abcdefghijklmnopqrstuvwxyz").strip()
        unit = text[len(number) :].strip()
        try:
            value = round(float(number) * UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            raise ConfigError(f"{what} {value!r} is no size; give bytes, or text like '12GB' or '900MiB'") from None
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{what} must be a positive number of bytes, or text like '12GB'; got {value!r}")
    return value


def return_freed_memory() -> None:
    """Has the C library (glibc) give tensors of 1 MB and more back to the system when they are freed, for the
    rest of this process: it would keep the place of smaller ones, and what is resident would exceed what is
    used. A page fault more per page is what it costs."""
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def _mega(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
