"""How much images of one prompt differ: a generator that forgot its noise would score well otherwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from ..training.scenes import KINDS, Scene, prompts, render, sample_scene


def pairwise_distance(images: ArrayLike) -> float:
    """Return the mean root-mean-square distance of all pairs of images [N, H, W, 3], N >= 2, in units of 1/255."""
    stack = np.asarray(images, np.float64)
    flat = stack.reshape(len(stack), -1)
    square = np.square(flat).sum(1)
    mean_square = np.maximum(square[:, None] + square[None] - 2 * flat @ flat.T, 0) / flat.shape[1]
    return float(np.sqrt(mean_square[np.triu_indices(len(flat), 1)]).mean())


def diversity(
    generate: Callable[[list[str]], ArrayLike], captions: int = 2, images: int = 16, seed: int = 0
) -> tuple[float, float]:
    """Return the mean pairwise distance over `images` images of each of `captions` captions a kind: of the
    generator, and of rendered scenes with the same captions. The ratio of the two is 1 for a
    generator whose images vary as the data do."""
    asked = [s for kind in KINDS for s in prompts(kind, captions, "train", seed)]
    made = np.asarray(generate([s.caption for s in asked for _ in range(images)]))
    ours = [pairwise_distance(group) for group in made.reshape(len(asked), images, *made.shape[1:])]
    data = [pairwise_distance(_renders(s, images, seed)) for s in asked]
    return float(np.mean(ours)), float(np.mean(data))


def _renders(scene: Scene, count: int, seed: int) -> np.ndarray:
    """Return pictures of `count` other scenes with this caption."""
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while len(found) < count:
        other = sample_scene(rng, "train", scene.kind)
        if other.caption == scene.caption:
            found.append(render(other))
    return np.stack(found)
