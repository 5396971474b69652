"""Captioned 64x64 scenes of coloured shapes: the data the demo model learns and is examined on.

The six kinds follow GenEval (arXiv 2310.11513): single, two, counting (2 to 4, as there), colors,
position, attribution. Drawing is deterministic: a `Scene` holds every number its image depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

Split = Literal["train", "heldout"]
Plane = NDArray[Any]

SHAPES = ("circle", "square", "triangle", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38), "yellow": (245, 200, 0), "green": (30, 160, 60), "blue": (30, 90, 225),
    "purple": (160, 50, 190), "black": (25, 25, 25),
}  # fmt: skip
# kind -> share of the training scenes; the hard kinds get more
KINDS = {
    "single": 0.08, "two": 0.16, "counting": 0.24, "colors": 0.08, "position": 0.24, "attribution": 0.20,
}  # fmt: skip
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}

SIZE = 64
_SIZES = {1: (18, 28), 2: (15, 23), 3: (14, 18), 4: (13, 16)}  # object size by number of objects, px
_RADII = {1: (0, 8), 2: (13, 17), 3: (16, 19), 4: (18, 20)}  # distance from the layout's centre, px
ARM = 0.36  # width of a cross's arm / its size


@dataclass(frozen=True)
class SceneObject:
    """One shape: its bounding box is `size` wide and high, centred on (cx, cy); in 1/64 image."""

    shape: str
    color: str
    cx: float
    cy: float
    size: float


@dataclass(frozen=True)
class Requirement:
    """What the caption asks for: `count` objects of `shape`, of `color` unless that is None."""

    shape: str
    color: str | None
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """A caption, one layout that satisfies it, and what any image must show to satisfy it.

    `relation` (position only) holds between the first and the second requirement.
    """

    kind: str
    caption: str
    objects: tuple[SceneObject, ...]
    required: tuple[Requirement, ...]
    relation: str | None = None
    background: int = 238


def is_heldout(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Return whether the unordered pair of (shape, color) objects is kept for evaluation (1 in 6)."""
    colors = list(COLORS)
    a, b = sorted((SHAPES.index(s), colors.index(c)) for s, c in (first, second))
    return (a[1] + 2 * b[1] + a[0] + b[0]) % 6 == 0


def sample_scene(rng: np.random.Generator, split: Split = "train", kind: str | None = None) -> Scene:
    """Draw a scene, of a random kind (shares as in `KINDS`) unless `kind` is given.

    Scenes with two different objects show a held-out pair exactly if `split` is "heldout"; the
    other kinds have one distribution in both splits. ConfigError for an unknown split or kind.
    """
    if split not in ("train", "heldout"):
        raise ConfigError(f"split is {split!r}; use 'train' or 'heldout'")
    if kind is None:
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    elif kind not in KINDS:
        raise ConfigError(f"scene kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    if kind in ("single", "colors", "counting"):
        return _same_objects(rng, kind)
    return _two_objects(rng, kind, split)


def prompts(kind: str, n: int, split: Split = "heldout", seed: int = 0) -> list[Scene]:
    """Return `n` scenes of one kind, the same for the same arguments."""
    rng = np.random.default_rng([seed, *kind.encode()])
    return [sample_scene(rng, split, kind) for _ in range(n)]


def render(scene: Scene, size: int = SIZE) -> NDArray[np.uint8]:
    """Draw the scene: uint8 [size, size, 3], anti-aliased by the distance to each outline."""
    image = np.full((size, size, 3), float(scene.background), np.float32)
    scale = size / SIZE
    for o in scene.objects:
        r = o.size * scale / 2
        x0, x1 = (min(max(int(o.cx * scale + d), 0), size) for d in (-r - 1, r + 2))
        y0, y1 = (min(max(int(o.cy * scale + d), 0), size) for d in (-r - 1, r + 2))
        x = np.arange(x0, x1, dtype=np.float32)[None] + (0.5 - o.cx * scale)
        y = np.arange(y0, y1, dtype=np.float32)[:, None] + (0.5 - o.cy * scale)
        cover = np.clip(0.5 - DISTANCE[o.shape](x, y, r), 0, 1)[..., None]
        patch = image[y0:y1, x0:x1]
        patch += cover * (np.asarray(COLORS[o.color], np.float32) - patch)
    return np.rint(image).astype(np.uint8)


def _triangle(x: Plane, y: Plane, r: float) -> Plane:
    """Return the distance to an upright isosceles triangle that fills the box: distance to its base and its two
    sides."""
    side = (2 * np.abs(x) - y - r) / math.sqrt(5)
    return np.maximum(side, y - r)


def _cross(x: Plane, y: Plane, r: float) -> Plane:
    x, y, a = np.abs(x), np.abs(y), r * ARM
    return np.minimum(np.maximum(x - r, y - a), np.maximum(x - a, y - r))


# signed distance (negative inside) to the outline of a shape of half-size r, px
DISTANCE: dict[str, Callable[[Plane, Plane, float], Plane]] = {
    "circle": lambda x, y, r: np.hypot(x, y) - r, "square": lambda x, y, r: np.maximum(np.abs(x), np.abs(y)) - r,
    "triangle": _triangle, "cross": _cross,
}  # fmt: skip


def _pick(rng: np.random.Generator, values: Iterable[str], n: int = 1) -> list[str]:
    """Draw `n` different values."""
    names = list(values)
    return [names[i] for i in rng.permutation(len(names))[:n]]


def _same_objects(rng: np.random.Generator, kind: str) -> Scene:
    """Draw a scene of kind single, colors or counting: one to four equal objects."""
    (shape,), (color,) = _pick(rng, SHAPES), _pick(rng, COLORS)
    n = int(rng.integers(2, 5)) if kind == "counting" else 1
    named = color if kind == "colors" or (n > 1 and rng.random() < 0.5) else None
    article, noun = ("a", shape) if n == 1 else (NUMBERS[n], PLURALS[shape])
    caption = f"{article} {named} {noun}" if named else f"{article} {noun}"
    objects = _place(rng, [(shape, color)] * n, rng.uniform(0, 2 * math.pi))
    return Scene(kind, caption, objects, (Requirement(shape, named, n),), None, _background(rng))


def _two_objects(rng: np.random.Generator, kind: str, split: Split) -> Scene:
    """Draw a scene of kind two, position or attribution: two objects of different shape."""
    while True:
        shapes = _pick(rng, SHAPES, 2)
        # colours that the caption binds differ, or swapping them would be no error
        colors = _pick(rng, COLORS, 2) if kind != "two" else [*_pick(rng, COLORS), *_pick(rng, COLORS)]
        pair = list(zip(shapes, colors, strict=True))
        if is_heldout(*pair) == (split == "heldout"):
            break
    colored = kind == "attribution" or (kind == "position" and rng.random() < 0.5)
    relation = _pick(rng, RELATIONS)[0] if kind == "position" else None
    names = [f"a {c} {s}" if colored else f"a {s}" for s, c in pair]
    caption = f"{names[0]} {relation or 'and'} {names[1]}"
    angle = rng.uniform(0, 2 * math.pi)
    if relation:
        dx, dy = RELATIONS[relation]
        angle = math.atan2(dy, dx) + rng.uniform(-0.35, 0.35)
    required = tuple(Requirement(s, c if colored else None) for s, c in pair)
    return Scene(kind, caption, _place(rng, pair, angle), required, relation, _background(rng))


def _background(rng: np.random.Generator) -> int:
    return int(rng.integers(230, 245))


def _place(rng: np.random.Generator, pairs: list[tuple[str, str]], angle: float) -> tuple[SceneObject, ...]:
    """Put the objects on a ring around the centre, the first at `angle`, without touching."""
    n = len(pairs)
    while True:
        radius, size = rng.uniform(*_RADII[n]), rng.uniform(*_SIZES[n])
        centre, jitter = rng.uniform(-3, 3, 2), rng.uniform(-1, 1, (n, 3))
        objects = []
        for i, (shape, color) in enumerate(pairs):
            at = angle + 2 * math.pi * i / n
            cx = SIZE / 2 + centre[0] + radius * math.cos(at) + jitter[i, 0]
            cy = SIZE / 2 + centre[1] + radius * math.sin(at) + jitter[i, 1]
            objects.append(SceneObject(shape, color, float(cx), float(cy), float(size + jitter[i, 2])))
        if _fits(objects):
            return tuple(objects)
        angle += rng.uniform(-0.05, 0.05)  # a crowded ring may only fit turned a little


def _fits(objects: list[SceneObject]) -> bool:
    """Return whether boxes lie 2 px inside the image and 3 px apart."""
    if any(not o.size / 2 + 2 <= c <= SIZE - 2 - o.size / 2 for o in objects for c in (o.cx, o.cy)):
        return False
    return all(
        max(abs(a.cx - b.cx), abs(a.cy - b.cy)) >= (a.size + b.size) / 2 + 3
        for i, a in enumerate(objects)
        for b in objects[:i]
    )
