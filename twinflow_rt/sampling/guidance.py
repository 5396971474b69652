"""Classifier-free guidance (arXiv 2207.12598): what a call asks for, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import items, number, shown
from ..errors import ConfigError

UNGUIDED = (
    "TwinFlow's models need no guidance, one evaluation makes the image; leave it out, or sample in mode 'multi'"
)


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
        least = {"scale": float("-inf"), "normalization": 0.0, "truncation": 0.0}
        for name, lowest in least.items():
            value = number(given := getattr(self, name))
            if value is None or value < lowest:
                which = "guidance" if name == "scale" else f"guidance's {name}"
                wanted = "a finite number" if name == "scale" else "a finite number of 0 or more"
                raise ConfigError(f"{which} must be {wanted}; got {shown(given)}")
            object.__setattr__(self, name, value)


def resolve_guidance(guidance: Any, negative: Any, mode: str, network: Any) -> Guidance | None:
    """Return a call's guidance; None where it is not guided. negative: its negative prompts. mode: of its sampler.
    Raises ConfigError where the network was trained for none, and for negative prompts without guidance."""
    found = guidance if isinstance(guidance, Guidance) or guidance is None else Guidance(guidance)
    texts = items(negative) or [negative]
    blank = all(text is None or (isinstance(text, str) and not text.strip()) for text in texts)
    if found is None and blank:
        return None
    if (embedded := getattr(network.config, "guidance_embeds", False)) or mode != "multi":
        if blank and (found is None or found.scale <= 1):
            return None
        why = "SANA-Sprint's guidance is part of its network, and constant; leave it out" if embedded else UNGUIDED
        raise ConfigError(f"guidance and negative prompts are not taken: {why}")
    if found is None or found.scale <= network.unguided:
        if blank:
            return None
        raise ConfigError(f"negative_prompt needs guidance above {network.unguided:g}: give guidance=, or leave it out")
    return found
