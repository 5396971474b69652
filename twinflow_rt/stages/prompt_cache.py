"""Contexts of prompts seen before: text encoder and prompt-only layers run once per prompt list."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields

from torch import Tensor

from ..models.context import Context


class PromptCache:
    """Keep at most `budget` bytes of contexts on the device; the least recently used go first, and all
    of them when another network asks.

    hits, misses: how often an entry was there or had to be made.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes, self.hits, self.misses = budget, 0, 0, 0
        self._network: Callable[[], object] = lambda: None
        self._entries: OrderedDict[Hashable, Context] = OrderedDict()

    def __str__(self) -> str:
        held = f"{self.bytes / 1e6:,.1f} of {self.budget / 1e6:,.1f} MB"
        return f"prompt cache: {len(self._entries)} entries, {held}; {self.hits} hits, {self.misses} misses"

    def get(self, key: Hashable, network: object, make: Callable[[], Context]) -> Context:
        """Return the context that `network` has for `key`, made if absent; one larger than the budget is not kept."""
        if self._network() is not network:  # compiled anew, with other adapters perhaps
            self.clear()
            self._network = weakref.ref(network)
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]
        self.misses += 1
        context = make()
        self._entries[key] = context
        self.bytes += context_bytes(context)
        while self.bytes > self.budget:
            self.bytes -= context_bytes(self._entries.popitem(last=False)[1])
        return context

    def clear(self) -> None:
        """Forget all contexts; the counts stay."""
        self._entries.clear()
        self.bytes = 0


def context_bytes(context: Context) -> int:
    """Return the bytes of the tensors in a context."""
    values = (getattr(context, field.name) for field in fields(context))
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
