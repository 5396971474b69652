"""What a pipeline and the planner ask of a text stage, whichever encoders a family has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..checkpoint.reading import Progress
from ..ops.selection import OpTable
from .stage import Part, StageOptions
from .text import PromptEmbeds


class TextStage(Protocol):
    """prompts -> PromptEmbeds. parts: its networks. max_tokens: longer prompts lose their tail. ops: the
    implementations that its networks run on. `stage.Stage` provides all but `width`, `__call__` and `probe`."""

    parts: tuple[Part, ...]
    options: StageOptions
    ops: OpTable
    max_tokens: int

    @property
    def width(self) -> int:
        """Features of an embedding."""

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Return the embeddings [B, L, width] of B prompts, on the stage's device in its weights' dtype."""

    def probe(self, tokens: int, networks: Sequence[Any] = (), /) -> PromptEmbeds:
        """Do the stage's work for one prompt of `tokens` tokens on the meta device, where nothing is computed.
        networks: `meta_networks()`, made if not given."""

    def meta_networks(self, ops: OpTable = ...) -> list[Any]:
        """Return copies of the networks without weights, on the meta device."""

    def require_precision(
        self, precision: str | None, skip_layers: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Raise ConfigError where the stage cannot run with 8-bit linear layers of this `precision`."""

    def materialize(
        self, device: torch.device, dtype: torch.dtype, options: StageOptions = ..., progress: Progress | None = None
    ) -> None:
        """Read the weights."""

    def notes(self) -> tuple[str, ...]:
        """Return lines for a plan."""
