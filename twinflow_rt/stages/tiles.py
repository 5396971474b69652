"""Decoding, and encoding, in tiles: the peak becomes that of one tile.

A decoder network is `tail(trunk(latents))`. The trunk, at a coarse resolution, has the attention and
whatever else must see all positions, and always runs whole. The tail, where nearly all memory goes, is
convolutions: a pixel depends on the features within `reach` cells. An encoder is the mirror image,
`trunk(head(image))`: here the head runs in tiles, and a cell depends on the pixels of cells within `reach`.

    Tails without group norms (Qwen-Image's VAE, DC-AE): a tile is computed from its own features and `reach`
    more on every side, and what those add is cut off again. So the tiles are parts of the whole image, up to
    the order in which a convolution sums, and are put side by side; there is no seam to hide.

    Tails with group norms (AutoencoderKL): a group norm's mean and variance are those of the tile, not of
    the image. That is an approximation, whose error docs/stages.md states. Neighbours differ by it, so they
    overlap by `BLEND` cells on each side of their edge, in which one fades into the other, and with it what the
    zeros beyond a tile's border have changed.

All tiles of an image are computed from windows of one size, at the image's border moved inwards: one shape, so one
recorded graph and one choice of kernels.

(diffusers runs trunk and tail per tile and fades over a quarter of it: attention then sees one tile, and
the borders are those of zero padding.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..config import integer, shown
from ..errors import ConfigError

BLEND = 8  # cells of overlap on each side of a tile's edge, where group norms make tiles differ
SMALLEST = 4  # cells: a smaller tile is nearly all margin


def reach(convs: Sequence[int]) -> int:
    """Return the cells, on every side, that a pixel of a tail depends on beyond its own; or a cell of a head.

    convs: 3x3 convolutions on each level, coarsest first. Between levels the size doubles, by one more
    convolution before or behind the doubling; one more stands at the image. Never too small, at most
    one cell per level too large.
    """
    cells = 1
    for level, count in enumerate(reversed(convs)):
        cells = (-(-cells // 2) + 1 if level else cells) + count
    return cells


def cell(network: Any) -> int:
    """Return the pixels along each axis that one cell of a network's features becomes."""
    return 1 << (len(network.convs) - 1)


def margin(network: Any) -> int:
    """Return the cells computed on every side of a tile beyond it."""
    return BLEND if blends(network) else reach(network.convs)


def blends(network: nn.Module) -> bool:
    """Return whether tiles of this network differ from the whole image where they meet: it has group norms."""
    return any(isinstance(module, nn.GroupNorm) for module in network.modules())


def smallest(network: Any) -> int:
    """Return the least side of a tile in pixels."""
    return cell(network) * max(SMALLEST, 2 * BLEND if blends(network) else 0)


def check_tile(network: Any, tile: int) -> None:
    """Raise ConfigError for a tile size that cannot work."""
    if (pixels := integer(tile)) is None or pixels < smallest(network):
        least = smallest(network)
        raise ConfigError(f"tile must be a number of pixels, at least {least} for this VAE; got {shown(tile)}")


def plainly(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def decode(
    network: Any, latents: Tensor, tile: int, check: Callable[[], None] = lambda: None,
    call: Callable[[str, Callable[[Tensor], Tensor], Tensor], Tensor] = plainly,
) -> Tensor:  # fmt: skip
    """Return `network(latents)` for raw latents [B, C, h, w], with the tail run on one tile of one image at a time.

    tile: its side in pixels without margins, at least `smallest`; tiles of one image have equal sizes up to
    a cell. check(): called before every tile; it may raise to give up. call(name, function, x): runs the trunk and
    each tile, by a recorded graph perhaps.
    """
    check_tile(network, tile)
    run = partial(_in_tiles, network, partial(call, "tile", network.tail), tile, (1, cell(network)), check)
    images = [run(call("trunk", network.trunk, one[None])) for one in latents]
    return torch.cat(images) if len(images) > 1 else images[0]


def encode(
    network: Any, images: Tensor, tile: int, check: Callable[[], None] = lambda: None,
    call: Callable[[str, Callable[[Tensor], Tensor], Tensor], Tensor] = plainly,
) -> Tensor:  # fmt: skip
    """Return `network(images)` of an encoder, images [B, 3, H, W], with the head run on one tile at a time: `decode`'s
    mirror image."""
    check_tile(network, tile)
    run = partial(_in_tiles, network, partial(call, "tile", network.head), tile, (cell(network), 1), check)
    latents = [call("trunk", network.trunk, run(one[None])) for one in images]
    return torch.cat(latents) if len(latents) > 1 else latents[0]


def _in_tiles(
    network: Any, run: Callable[[Tensor], Tensor], tile: int, sides: tuple[int, int], check: Callable[[], None],
    source: Tensor,
) -> Tensor:  # fmt: skip
    """Return run(source), by tiles of [1, C, ...]. sides: of one cell in the source and in the result."""
    (read, made), blend, far = sides, BLEND if blends(network) else 0, margin(network)
    height, width = (n // read for n in source.shape[2:])
    core = tile // cell(network)
    rows, columns = cuts(height, core), cuts(width, core)
    if len(rows) == len(columns) == 1:
        return run(source)
    tall, wide = window_side(height, core, far), window_side(width, core, far)
    result: Tensor | None = None
    for top, bottom in rows:
        for left, right in columns:
            check()
            y, x = window(top, tall, height, far), window(left, wide, width, far)
            part = source[:, :, pixels(y, read), pixels(x, read)]
            part = run(part.clone(memory_format=torch.channels_last))
            if result is None:
                result = part.new_zeros((1, part.shape[1], height * made, width * made))
            a, b = around(top, bottom, height, blend), around(left, right, width, blend)
            part = part[:, :, inside(a, y, made), inside(b, x, made)]
            target = result[:, :, pixels(a, made), pixels(b, made)]
            if not blend:
                target.copy_(part)
                continue
            down = ramp((top, bottom), a, height, blend, made).to(part)
            across = ramp((left, right), b, width, blend, made).to(part)
            target.addcmul_(part, down[:, None] * across)
    assert result is not None
    return result


def cuts(length: int, core: int) -> list[tuple[int, int]]:
    """Return (start, end) of the parts that `length` cells are cut into: as few as have at most `core` cells, and of
    equal sizes up to one."""
    count = -(-length // core)
    edges = [length * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def window_side(length: int, core: int, far: int) -> int:
    """Return the cells along an axis of `length` that every tile of up to `core` cells is computed from, `far` more on
    each side among them where the image has them."""
    count = -(-length // core)
    return min(-(-length // count) + 2 * far, length)


def window(start: int, side: int, length: int, far: int) -> slice:
    """Return the `side` cells that a tile beginning at `start` is computed from: from `far` before it on, within the
    image."""
    first = min(max(start - far, 0), length - side)
    return slice(first, first + side)


def around(start: int, end: int, length: int, beyond: int) -> slice:
    """Return the cells from `beyond` before start to `beyond` behind end, within the image."""
    return slice(max(start - beyond, 0), min(end + beyond, length))


def pixels(cells: slice, size: int) -> slice:
    return slice(cells.start * size, cells.stop * size)


def inside(part: slice, whole: slice, size: int) -> slice:
    """Return where the pixels of cells `part` lie in a decoded `whole`."""
    return slice((part.start - whole.start) * size, (part.stop - whole.start) * size)


def ramp(core: tuple[int, int], span: slice, length: int, blend: int, size: int) -> Tensor:
    """Return the weights of a tile's pixels along one axis, float32: 1 inside, falling to 0 over the `2 * blend` cells
    around an edge shared with a neighbour, whose weights rise to 1 there."""
    at = torch.arange(span.start * size, span.stop * size, dtype=torch.float32) + 0.5
    weight = torch.ones_like(at)
    if core[0] > 0:
        weight = weight * ((at - (core[0] - blend) * size) / (2 * blend * size)).clamp(0, 1)
    if core[1] < length:
        weight = weight * (((core[1] + blend) * size - at) / (2 * blend * size)).clamp(0, 1)
    return weight
