"""GenEval's rules (arXiv 2310.11513) on detected shapes, and scores over many images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigError
from ..training.scenes import KINDS, RELATIONS, Requirement, Scene, Split, prompts
from .detect import Detection, detect

Confusion = dict[str, dict[tuple[object, object], int]]
MARGIN = 0.1  # GenEval's: part of both objects' sizes that an offset must exceed to count


@dataclass(frozen=True)
class Verdict:
    """Whether an image satisfies its caption; `reason` says what is missing, or "ok"."""

    correct: bool
    reason: str
    detections: tuple[Detection, ...]


@dataclass(frozen=True)
class Scores:
    """Shares of correct images: per kind, and `mean` over the kinds as GenEval's overall score.

    `confusion["shape" | "color" | "count" | "relation"]` counts (asked, shown) pairs; shown is None
    where nothing was found. Shape and colour come from the scenes asking for one object.
    """

    per_kind: dict[str, float]
    mean: float
    images: int
    confusion: Confusion
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        kinds = "  ".join(f"{kind} {share:.3f}" for kind, share in self.per_kind.items())
        return f"mean {self.mean:.3f} ({self.images} images)  {kinds}"


def check(image: ArrayLike, scene: Scene) -> Verdict:
    """Examine one image (uint8 [H, W, 3] or PIL) against the scene's caption.

    Each kind needs the asked shapes, in the asked colours; more than asked is wrong in counting
    only, where the shape must appear exactly so often in any colour. In position, every first
    object must stand in the relation to every second one.
    """
    found = detect(image)
    reason = next((r for r in _faults(found, scene) if r), "ok")
    return Verdict(reason == "ok", reason, tuple(found))


def score(images: Iterable[ArrayLike], scenes: Sequence[Scene]) -> Scores:
    """Check images[i] against scenes[i]. Raises ConfigError if there is not one image per scene."""
    images = list(images)
    if len(images) != len(scenes) or not scenes:
        raise ConfigError(f"{len(images)} images for {len(scenes)} scenes; give one image per scene")
    verdicts = tuple(check(i, s) for i, s in zip(images, scenes, strict=True))
    per_kind = {}
    for kind in KINDS:
        of_kind = [v.correct for v, s in zip(verdicts, scenes, strict=True) if s.kind == kind]
        if of_kind:
            per_kind[kind] = float(np.mean(of_kind))
    mean = float(np.mean(list(per_kind.values())))
    return Scores(per_kind, mean, len(images), _confusion(verdicts, scenes), verdicts)


def examine(
    generate: Callable[[list[str]], Iterable[ArrayLike]], per_kind: int = 50, split: Split = "heldout", seed: int = 0
) -> Scores:
    """Score `generate(captions) -> images` on `per_kind` captions of each kind."""
    scenes = [s for kind in KINDS for s in prompts(kind, per_kind, split, seed)]
    return score(generate([s.caption for s in scenes]), scenes)


def relations(first: Detection, second: Detection) -> set[str]:
    """Return where `first` is as seen from `second`: none, one or (on a diagonal) two of RELATIONS.

    GenEval's rule: the offset less MARGIN x both sizes, over the offset's length, exceeds 1/2.
    """
    offset = np.array([first.cx - second.cx, first.cy - second.cy])
    clear = np.maximum(np.abs(offset) - MARGIN * (first.size + second.size), 0) * np.sign(offset)
    direction = clear / max(float(np.linalg.norm(offset)), 1e-9)
    return {name for name, axis in RELATIONS.items() if direction @ np.array(axis) > 0.5}


def _matches(found: Iterable[Detection], asked: Requirement) -> list[Detection]:
    return [d for d in found if d.shape == asked.shape and asked.color in (None, d.color)]


def _faults(found: list[Detection], scene: Scene) -> Iterable[str]:
    """Yield the reasons why the detections fail the scene, worst first."""
    for asked in scene.required:
        name = f"{asked.color} {asked.shape}" if asked.color else asked.shape
        matching = _matches(found, asked)
        if len(matching) < asked.count:
            yield f"{len(matching)} of {asked.count} {name}"
        same_shape = sum(d.shape == asked.shape for d in found)
        if scene.kind == "counting" and same_shape > asked.count:
            yield f"{same_shape} {asked.shape} instead of {asked.count}"
    if scene.relation:
        first, second = (_matches(found, asked) for asked in scene.required)
        if not all(scene.relation in relations(a, b) for a in first for b in second):
            yield f"not {scene.relation}"


def _confusion(verdicts: Iterable[Verdict], scenes: Iterable[Scene]) -> Confusion:
    """Count (asked, shown); see Scores."""
    counts: dict[str, Counter[tuple[object, object]]] = {
        name: Counter() for name in ("shape", "color", "count", "relation")
    }
    for verdict, scene in zip(verdicts, scenes, strict=True):
        found, asked = verdict.detections, scene.required[0]
        if scene.kind in ("single", "colors"):
            counts["shape"][asked.shape, found[0].shape if found else None] += 1
        if scene.kind == "colors":
            counts["color"][asked.color, found[0].color if found else None] += 1
        if scene.kind == "counting":
            counts["count"][asked.count, len(found)] += 1
        if scene.relation:
            first, second = (_matches(found, r) for r in scene.required)
            shown = relations(first[0], second[0]) if first and second else set()
            best = scene.relation if scene.relation in shown else next(iter(sorted(shown)), None)
            counts["relation"][scene.relation, best] += 1
    return {name: dict(counter) for name, counter in counts.items()}
