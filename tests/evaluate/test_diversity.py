"""Diversity: what it measures, and that collapse shows."""

from __future__ import annotations

import numpy as np
import pytest

from twinflow_rt.evaluate import diversity, pairwise_distance
from twinflow_rt.training.scenes import KINDS, render, sample_scene


def test_pairwise_distance_of_known_images():
    a, b = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 10, np.uint8)
    assert pairwise_distance([a, b]) == pytest.approx(10)
    assert pairwise_distance([a, b, b]) == pytest.approx(20 / 3)  # of three pairs, one is equal
    one = b.copy()
    one[0, 0, 0] += 48
    assert pairwise_distance([b, one]) == pytest.approx(48 / np.sqrt(48))


def test_data_is_as_diverse_as_itself_and_collapse_shows():
    def honest(captions):
        rng, out = np.random.default_rng(9), {}
        for caption in dict.fromkeys(captions):
            kind_scenes = []
            while len(kind_scenes) < captions.count(caption):
                scene = sample_scene(rng)
                if scene.caption == caption:
                    kind_scenes.append(render(scene))
            out[caption] = iter(kind_scenes)
        return [next(out[c]) for c in captions]

    spread, data = diversity(honest, captions=1, images=8)
    assert spread == pytest.approx(data, rel=0.15)
    rng = np.random.default_rng(0)
    fixed = {kind: render(sample_scene(rng, kind=kind)) for kind in KINDS}
    collapsed, again = diversity(lambda captions: [fixed["two"]] * len(captions), captions=1, images=8)
    assert collapsed == 0 and again == data
