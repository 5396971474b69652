"""What is measured, as data: the folder that all peers of a case read, and the size of the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinflow_rt.bench import random_weights
from twinflow_rt.loading import DEMO


@dataclass(frozen=True)
class Case:
    """model: None for the demo, or a name and options of `bench.random_weights`. part: "image" or "vae".
    size: pixels along each side, None for the model's default. steps: None for TwinFlow's one evaluation; else of an
    ordinary flow model, by its own scheduler."""

    model: tuple[str, dict[str, Any]] | None
    part: str = "image"
    size: int | None = None
    steps: int | None = None

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """The model folder; random weights are declared in a temporary one."""
        if self.model is None:
            yield DEMO
            return
        name, options = self.model
        plain = self.steps is not None
        with random_weights.temporary(name, dtype="float32", plain=plain, **options) as folder:
            yield folder


MEDIUM = ("z-image", {"scale": 0.2, "layers": 16})
CASES = {
    "demo": Case(None),
    "medium": Case(MEDIUM, size=384),
    "medium-256": Case(MEDIUM, size=256),
    "medium-4": Case(MEDIUM, size=384, steps=4),
    "medium-8": Case(MEDIUM, size=384, steps=8),
    "medium-1024": Case(MEDIUM, size=512),
    "vae": Case(("z-image", {"layers": 1}), "vae", 256),
    "qwen-vae": Case(("qwen-image", {"layers": 1}), "vae", 256),
}
DEFAULT = ("demo", "medium", "vae", "qwen-vae")
PEERS = ("ours", "ours-int8", "ours-bf16", "diffusers", "diffusers-compile", "openvino", "openvino-bf16")
PROMPTS = "a photograph of a lighthouse {n:03d}"
SEED = 7


def applies(peer: str, part: str) -> bool:
    """Whether a peer differs from the others in this part: int8 concerns the transformer only."""
    return part == "image" or peer != "ours-int8"
