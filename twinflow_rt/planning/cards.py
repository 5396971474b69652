"""Which plan fits GPUs of common sizes: counted from configs and file headers, for cards that need not be here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint.checkpoint import OWN_FILES, Checkpoint, Files
from ..errors import ConfigError
from ..families import family_of
from ..stages.stage import StageOptions
from .memory_costs import GPU, Costs, Network, costs_of, weights_of
from .memory_plan import PROMPT_TOKENS, choose

CARDS = (6, 8, 12, 16, 24)  # GB, as cards are sold: GiB
PRECISIONS = {"bf16": None, "int8": "int8", "int4": "int4"}  # of network and text encoders, the most exact first
SIDE = 1024  # pixels of the image, where a model makes such
DTYPE = torch.bfloat16

Row = dict[str, str | int]  # title of a column -> what it says, or bytes


def usable(card: int) -> int:
    """Return the bytes of a card of so many GB that a plan may take: all but a tenth and half a GiB, for the driver,
    libraries' workspaces and the allocator's rounding. Judged, not measured."""
    return (card << 30) * 9 // 10 - (1 << 29)


def count(
    folder: Path, size: tuple[int | None, int | None] = (None, None), files: Files = OWN_FILES
) -> tuple[dict[str, Costs], tuple[int, int, int]]:
    """Return what the model in `folder` takes on a GPU in each of `PRECISIONS`, and the call that is for.

    size: height and width of its image; default: `SIDE`, or the model's own where it makes no such image. files: read
    in place of the folder's networks. No weight is read. Raises CheckpointError, ConfigError.
    """
    checkpoint = Checkpoint.of_part(folder / "transformer", files)
    family = family_of(checkpoint.config)
    family.scheduler(folder, checkpoint)  # which says whether there is a second embedder
    text, vae, sizes = family.open(folder, checkpoint.config, files)
    text.max_tokens = min(text.max_tokens, PROMPT_TOKENS)
    side = SIDE if min(sizes.max_height, sizes.max_width) >= SIDE else sizes.default
    largest = (*sizes.resolve(*(size if any(size) else (side, side))), 1)
    plain = Network(family.build(family.config.from_dict(checkpoint.config), folded_steps=1), checkpoint, family.layout)
    costs = costs_of(text, vae, plain, device=GPU, dtype=DTYPE, largest=largest)

    def held_in(kind: str | None) -> Costs:
        network = replace(plain, precision=kind)
        return replace(costs, weights=weights_of(text, vae, network, GPU, DTYPE, StageOptions(precision=kind)))

    return {name: held_in(kind) for name, kind in PRECISIONS.items()}, largest


def fits(model: str, costs: Mapping[str, Costs], largest: tuple[int, int, int]) -> list[Row]:
    """Return a row for each of `CARDS`: the first precision whose network need not stream, else the last, streaming."""
    return [{"model": model, "image": f"{largest[1]}x{largest[0]}", **_fit(card, costs, largest)} for card in CARDS]


def _fit(card: int, costs: Mapping[str, Costs], largest: tuple[int, int, int]) -> Row:
    found: Row = {"card": f"{card} GB", "precision": "does not fit"}
    for precision, one in costs.items():
        try:
            plan = choose(one, usable(card), largest)
        except ConfigError:
            continue
        text, network = one.weights["text"], one.weights["network"]
        on_host = network.passing[len(network.blocks) - plan.streamed :] + (text.passing if plan.text_streams else ())
        found |= {
            "precision": precision, "text encoder": "streams" if plan.text_streams else "stays",
            "network": f"{plan.streamed} of {plan.blocks} blocks stream" if plan.streamed else "stays",
            "decoding": "whole" if plan.tile is None else f"tiles of {plan.tile}", "predicted peak": plan.peak,
            # pinned memory comes in powers of two
            "on the host": sum(1 << (size - 1).bit_length() for size in on_host) + text.tables * plan.text_streams,
        }  # fmt: skip
        if not plan.streamed:
            break
    return found


def table(rows: Sequence[Row]) -> str:
    """Return rows as a table in Markdown."""
    heads = list(dict.fromkeys(title for row in rows for title in row))
    values = [[row.get(title, "") for title in heads] for row in rows]
    said = [[v if isinstance(v, str) else f"{v / 1e9:.1f} GB" * (v > 0) for v in row] for row in values]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *said))
