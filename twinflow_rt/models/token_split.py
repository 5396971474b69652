"""How a network's tokens are spread over processes; here: not at all (`runtime.parallel` has the other answer)."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class TokenSplit(Protocol):
    """How the tokens of a network are spread over processes."""

    def share(self, x: Tensor, *counts: int) -> Tensor:
        """Return this process's tokens of x [B, sum(counts), ...], streams of `counts` tokens one after the other."""

    def whole(self, x: Tensor, count: int) -> Tensor:
        """Return the first `count` tokens of the one stream that x [B, S_local, ...] is a share of, on every
        process."""

    def keys(self, lengths: Tensor | None, *counts: int) -> Any:
        """Return what attention takes as `lengths` where it sees streams of `counts` tokens."""


class Whole:
    """One process has all tokens."""

    def share(self, x: Tensor, *counts: int) -> Tensor:
        return x

    def whole(self, x: Tensor, count: int) -> Tensor:
        return x[:, :count]

    def keys(self, lengths: Tensor | None, *counts: int) -> Tensor | None:
        return lengths


WHOLE = Whole()
