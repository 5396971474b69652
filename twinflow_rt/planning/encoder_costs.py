"""What reading pictures takes. A VAE's encoder is part of no memory plan: it is read when the first picture comes, and
within a budget it goes again with every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..checkpoint.layout import check
from ..errors import ConfigError, TwinFlowError
from ..ops import Target, select
from ..stages import tiles
from ..stages.stage import StageOptions
from ..stages.vae import VaeDecoder, VaeEncoder
from .footprint import peak_of
from .memory_costs import Network, network_weights
from .memory_plan import TILES, MemoryPlan, mega


@contextmanager
def opened(vae: VaeDecoder, memory: MemoryPlan | None, size: tuple[int, int]) -> Iterator[VaeEncoder]:
    """Yield the VAE's encoder, read. size: height and width of the pictures, which within a budget are encoded in the
    largest tiles that fit beside the weights held. Raises ConfigError where none do, CheckpointError for files without
    an encoder."""
    encoder, options = vae.encoder, vae.options
    if memory is None:
        if not encoder.reports:
            encoder.materialize(vae.device, vae.dtype, StageOptions(options.captures, tile=options.tile))
        yield encoder
        return
    budget, held, least = memory.budget or 0, sum(memory.weights.values()), tiles.smallest(encoder.network)
    sides = [None, *(side for side in TILES if side > least), least] if options.tile is None else [options.tile]
    needs = {side: held + sum(costs(vae, size, side)) for side in sides}
    if not (fitting := [side for side in sides if needs[side] <= budget]):
        raise ConfigError(
            f"memory_budget {mega(budget)} leaves no room to encode a picture of {size[1]}x{size[0]}, which takes "
            f"{mega(min(needs.values()))} with the weights held: give more, or a smaller picture"
        )
    try:
        encoder.materialize(vae.device, vae.dtype, StageOptions(tile=fitting[0]))
        yield encoder
    finally:
        vae.close_encoder()


def costs(vae: VaeDecoder, size: tuple[int, int], tile: int | None) -> tuple[int, int]:
    """Return the bytes that the encoder's weights take, and that encoding one picture works in, whole or in tiles."""
    part, dtype = vae.encoder.parts[0], vae.dtype
    network = part.meta_network(select(Target.of(torch.device("cpu"), torch.float32))[0])
    held = network_weights(Network(network, part.checkpoint, part.layout, channels_last=True), vae.device, dtype)
    image = torch.empty(1, 3, *size, dtype=torch.float32, device="meta")
    if tile is None:
        needed = peak_of(lambda: network(image))[1]
    else:
        cell = tiles.cell(network)
        cells = [n // cell for n in size]
        sides = [cell * tiles.window_side(n, max(tile // cell, 1), tiles.margin(network)) for n in cells]
        window = image.new_empty(1, 3, *sides)
        made, of_tile = peak_of(lambda: network.head(window))
        features = made.new_empty(1, made.shape[1], *cells)
        needed = features.nbytes + max(window.nbytes + of_tile, peak_of(lambda: network.trunk(features))[1])
    return held.held(0, 0), round((image.nbytes + needed) * dtype.itemsize / torch.float32.itemsize)


def note(vae: VaeDecoder, size: tuple[int, int]) -> str:
    """Return a line for a plan: what pictures would take."""
    try:
        part, read = vae.encoder.parts[0], bool(vae.encoder.reports)
        if not read:
            check(part.network.state_dict(), part.checkpoint, part.layout)
    except TwinFlowError as error:
        return f"pictures: not taken: {error}"
    state = "encoder read" if read else "encoder not read before the first one"
    held, needed = costs(vae, size, vae.options.tile)
    return f"pictures: {state}; it holds {mega(held)}, and works in {mega(needed)} for one of {size[1]}x{size[0]}"
