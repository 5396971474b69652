"""Classifier-free guidance (arXiv 2207.12598): what a call asks for, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import check_number, items
from ..errors import ConfigError

DISTILLED = "this model was distilled, its guidance is part of its network; leave it out"
UNGUIDED = "TwinFlow's models need no guidance, one evaluation makes the image; leave it out, or sample in mode 'multi'"


@dataclass(frozen=True)
class Guidance:
    """How far images are driven from the negative prompt to theirs.

    scale: as diffusers' pipeline of the family counts it: v = v_neg + scale (v - v_neg), none up to 1; of Z-Image
    v + scale (v - v_neg), none up to 0. normalization: most that an image's guided velocity may grow in norm, as a
    multiple of the prompt's own; 0: anything. truncation: only times t with 1 - t up to this are guided, from 0 (none
    but pure noise) to 1 (all).
    """

    scale: float
    normalization: float = 0.0
    truncation: float = 1.0

    def __post_init__(self) -> None:
        for name, which in (("scale", ""), ("normalization", "'s normalization"), ("truncation", "'s truncation")):
            object.__setattr__(self, name, check_number(f"guidance{which}", getattr(self, name)))
        if min(self.normalization, self.truncation) < 0:
            raise ConfigError(f"normalization and truncation of {self} must be 0 or more")


def resolve_guidance(guidance: Any, negative: Any, mode: str, distilled: bool, network: Any) -> Guidance | None:
    """Return a call's guidance; None where it is not guided. negative: its negative prompts. mode: of its sampler.
    distilled: whether the model was trained for none. network: whose `unguided` is the scale that changes nothing.
    Raises ConfigError where the model was trained for none, and for negative prompts without guidance."""
    found = guidance if isinstance(guidance, Guidance) or guidance is None else Guidance(guidance)
    texts = items(negative) or [negative]
    blank = all(text is None or (isinstance(text, str) and not text.strip()) for text in texts)
    if found is None and blank:
        return None
    if distilled or mode != "multi":
        if blank and (found is None or found.scale <= 1):
            return None
        raise ConfigError(f"guidance and negative prompts are not taken: {DISTILLED if distilled else UNGUIDED}")
    if found is None or found.scale <= network.unguided:
        if blank:
            return None
        raise ConfigError(f"negative_prompt needs guidance above {network.unguided:g}: give guidance=, or leave it out")
    return found
