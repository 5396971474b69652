"""The prompts' side of a velocity network, which depends on the prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


def host_lengths(embeds: Tensor, lengths: Sequence[int] | Tensor) -> tuple[tuple[int, ...], int, Tensor | None]:
    """Of prompts embeds [B, L, D] that count up to `lengths`: (lengths on the host, rows to compute, lengths on
    the device where a mask is needed). Lengths that are on the device already stay there, and all L rows are
    computed under the mask: no shape depends on a value, as an exported program wants it."""
    if isinstance(lengths, Tensor):
        return (), embeds.shape[1], lengths
    counts = tuple(int(n) for n in lengths)
    equal = min(counts) == max(counts)
    return counts, max(counts), None if equal else torch.tensor(counts, device=embeds.device)


@dataclass(frozen=True)
class Context:
    """What `encode_context` makes of B prompts; families add fields.

    tokens: [B, L, dim]. lengths: tokens that count, per prompt; () where the device alone knows. Every
    field is a tensor whose first axis is the prompt (or of size 1: the same for all), a tuple with one
    entry per prompt, or None.
    """

    tokens: Tensor
    lengths: tuple[int, ...]

    def select(self, rows: Sequence[int]) -> Self:
        """The context of prompts `rows`, in that order and repeated as often as named: one per image."""
        if list(rows) == list(range(len(self.lengths))):
            return self
        index = torch.tensor(rows, device=self.tokens.device)

        def pick(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(value[row] for row in rows)
            return value if value is None or value.shape[0] == 1 < len(self.lengths) else value[index]

        return replace(self, **{f.name: pick(getattr(self, f.name)) for f in fields(self)})
