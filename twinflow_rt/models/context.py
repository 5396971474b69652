"""The prompts' side of a velocity network, which depends on the prompts alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

BUCKET = 32  # prompt tokens


def bucket(length: int) -> int:
    """Return the length that prompts of `length` tokens are padded to for a recorded network: the next multiple of
    `BUCKET`, so that prompts of many lengths share a few recordings."""
    return -(-length // BUCKET) * BUCKET


def host_lengths(embeds: Tensor, lengths: Sequence[int] | Tensor) -> tuple[tuple[int, ...], int, Tensor | None]:
    """Return (lengths on the host, rows to compute, lengths on the device or None where no mask is needed) of prompts
    embeds [B, L, D] that count up to `lengths`. Lengths that are on the device already stay there, and all L rows are
    computed under the mask: no shape depends on a value, as an exported program wants it."""
    if isinstance(lengths, Tensor):
        return (), embeds.shape[1], lengths
    counts = tuple(int(n) for n in lengths)
    equal = min(counts) == max(counts)
    return counts, max(counts), None if equal else torch.tensor(counts, device=embeds.device)


def all_rows(embeds: Tensor, lengths: Sequence[int] | Tensor, model: str) -> tuple[int, ...]:
    """Return the lengths, on the host, of prompts embeds [B, L, D] of which `model` reads every row; () where they are
    on the device, where they are not looked at. Raises ConfigError for lengths other than L."""
    counts = () if isinstance(lengths, Tensor) else tuple(int(n) for n in lengths)
    if any(n != embeds.shape[1] for n in counts):
        raise ConfigError(
            f"prompt lengths {counts} in embeddings of {embeds.shape[1]} rows: {model} reads them all; pad prompts as "
            "`Pipeline.text` does"
        )
    return counts


@dataclass(frozen=True)
class Context:
    """What `encode_context` makes of B prompts; families add fields.

    tokens: [B, L, dim]. lengths: tokens that count, per prompt; () where the device alone knows. Every
    field is a tensor whose first axis is the prompt (or of size 1: the same for all), a tuple with one
    entry per prompt, or None. prompt_axes: the axis of L in fields that have it.
    """

    prompt_axes: ClassVar[dict[str, int]] = {"tokens": 1}

    tokens: Tensor
    lengths: tuple[int, ...]

    def in_bucket(self) -> Self:
        """Return the context for a recorded network: prompts padded to bucket(L) tokens under the mask `ragged`, and no
        length left on the host, so that shapes alone tell two contexts apart. A family without `ragged` has one
        length."""
        length, names = self.tokens.shape[1], {f.name for f in fields(self)}
        changed: dict[str, Any] = {"lengths": ()}
        if "ragged" in names and (more := bucket(length) - length):
            for name, axis in self.prompt_axes.items():
                value = getattr(self, name)
                changed[name] = F.pad(value, (0, 0) * (value.ndim - 1 - axis) + (0, more))
            if vars(self)["ragged"] is None:
                changed["ragged"] = torch.tensor(self.lengths, device=self.tokens.device)
        return replace(self, **changed)

    def within(self, lengths: Sequence[int]) -> Self:
        """Return what `in_bucket` was called on, of prompts of these lengths: no longer than the longest, unmasked
        where all are equal."""
        longest, names = max(lengths), {f.name for f in fields(self)}
        changed: dict[str, Any] = {"lengths": tuple(lengths)}
        for name, axis in self.prompt_axes.items():
            if (value := getattr(self, name)).shape[axis] > longest:
                changed[name] = value.narrow(axis, 0, longest).clone()
        if "ragged" in names and min(lengths) == longest:
            changed["ragged"] = None
        return replace(self, **changed)

    def select(self, numbers: Sequence[int]) -> Self:
        """Return the context of the prompts with these numbers, repeated as often as named: one per image."""
        if list(numbers) == list(range(len(self.lengths))):
            return self
        index = torch.tensor(numbers, device=self.tokens.device)

        def pick(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(value[number] for number in numbers)
            return value if value is None or value.shape[0] == 1 < len(self.lengths) else value[index]

        return replace(self, **{f.name: pick(getattr(self, f.name)) for f in fields(self)})


def recorded_context(
    network: Any, call: Callable[..., Any], embeds: Tensor, lengths: Sequence[int], **extras: Tensor
) -> Context:
    """Return network.encode_context(embeds, lengths, **extras) where `call(function, *args)` records a graph per shape
    of args: prompts are padded to a bucket, and their lengths mask them on the device. A network that reads every row
    (`fixed_length`) has prompts of one length."""
    if not network.fixed_length:
        longest = bucket(max(lengths))
        embeds = F.pad(embeds[:, :longest], (0, 0, 0, max(longest - embeds.shape[1], 0)))

    def run(embeds: Tensor, lengths: Tensor, extras: dict[str, Tensor]) -> Any:
        return network.encode_context(embeds, lengths, **extras)

    context: Context = call(run, embeds, torch.tensor(lengths, device=embeds.device), extras)
    multiple = network.prompt_multiple  # tokens of a context may be padding that counts
    return context.within([-(-n // multiple) * multiple for n in lengths])
