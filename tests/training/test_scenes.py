"""Scenes: determinism, captions, geometry, the held-out split, the drawing itself."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from twinflow_rt.errors import ConfigError
from twinflow_rt.training.scenes import (
    ARM,
    COLORS,
    KINDS,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    is_heldout,
    prompts,
    render,
    sample_scene,
)

SPLITS = ("train", "heldout")


def draw(n: int, split: str = "train", seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split) for _ in range(n)]


def test_same_seed_same_scenes_and_pixels():
    first, second = draw(50), draw(50)
    assert first == second
    assert all((render(a) == render(b)).all() for a, b in zip(first, second, strict=True))
    assert draw(50, seed=1) != first
    assert prompts("counting", 5) == prompts("counting", 5) != prompts("counting", 5, seed=1)


def test_training_draws_every_kind_in_its_share():
    kinds = [s.kind for s in draw(3000)]
    assert sum(KINDS.values()) == pytest.approx(1)
    for kind, share in KINDS.items():
        assert kinds.count(kind) / len(kinds) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_caption_says_what_the_scene_requires_and_shows(kind, split):
    for scene in prompts(kind, 60, split):
        words = scene.caption.split()
        assert scene.kind == kind and scene.caption == scene.caption.lower() and len(words) <= 12
        shown = [(o.shape, o.color) for o in scene.objects]
        assert len(shown) == sum(r.count for r in scene.required)
        for r in scene.required:
            assert sum(s == r.shape and r.color in (None, c) for s, c in shown) == r.count
            assert any(w.startswith(r.shape) for w in words)
        named = [w for w in words if w in COLORS]
        assert named == [r.color for r in scene.required if r.color]
        assert (scene.relation is None) == (kind != "position")
        if scene.relation:
            assert scene.relation in scene.caption


@pytest.mark.parametrize("split", SPLITS)
def test_objects_lie_inside_and_apart(split):
    for scene in draw(500, split):
        for o in scene.objects:
            assert o.size / 2 + 2 <= min(o.cx, o.cy) and max(o.cx, o.cy) + o.size / 2 <= 62
        for a, b in itertools.combinations(scene.objects, 2):
            gap = max(abs(a.cx - b.cx), abs(a.cy - b.cy)) - (a.size + b.size) / 2
            assert gap >= 3, scene


def test_relation_holds_clearly():
    for scene in prompts("position", 200, "train"):
        a, b = scene.objects
        dx, dy = RELATIONS[scene.relation]
        along, across = ((a.cx - b.cx) * dx + (a.cy - b.cy) * dy, (a.cx - b.cx) * dy + (a.cy - b.cy) * dx)
        assert along > 20 and abs(across) < 0.6 * along


def test_held_out_pairs_never_appear_in_training():
    def pair(scene: Scene) -> tuple[tuple[str, str], ...]:
        return tuple((o.shape, o.color) for o in scene.objects)

    two = ("two", "position", "attribution")
    assert not any(is_heldout(*pair(s)) for s in draw(3000) if s.kind in two)
    assert all(is_heldout(*pair(s)) for s in draw(1000, "heldout") if s.kind in two)


def test_held_out_rule_is_symmetric_and_covers_every_shape_and_color():
    things = list(itertools.product(SHAPES, COLORS))
    pairs = [(a, b) for a, b in itertools.combinations(things, 2) if a[0] != b[0]]
    held = [p for p in pairs if is_heldout(*p)]
    assert all(is_heldout(a, b) == is_heldout(b, a) for a, b in pairs)
    assert len(held) / len(pairs) == pytest.approx(1 / 6, abs=0.02)
    # every object is seen in training in most of its pairs, and in some held-out one
    assert {t for p in held for t in p} == set(things)


AREAS = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 1 - (1 - ARM) ** 2}


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_area_and_centre_are_exact(shape):
    o = SceneObject(shape, "black", 30.3, 33.8, 21.4)
    dark = (238.0 - render(Scene("single", "", (o,), ()))[..., 0]) / (238 - COLORS["black"][0])
    assert dark.sum() == pytest.approx(AREAS[shape] * o.size**2, rel=0.02)
    axis = np.arange(64) + 0.5
    assert dark.sum(0) @ axis / dark.sum() == pytest.approx(o.cx, abs=0.05)
    low = o.cy + (o.size / 6 if shape == "triangle" else 0)
    assert dark.sum(1) @ axis / dark.sum() == pytest.approx(low, abs=0.1)


def test_larger_rendering_shows_the_same_picture():
    for scene in draw(10):
        small = render(scene, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(small - render(scene)).mean() < 1.0


@pytest.mark.parametrize("bad", [{"split": "test"}, {"kind": "colours"}])
def test_unknown_names_are_refused(bad):
    with pytest.raises(ConfigError, match="; use "):
        sample_scene(np.random.default_rng(0), **bad)


def test_fast_enough_to_feed_training():
    start = time.perf_counter()
    for scene in draw(200):
        render(scene)
    assert time.perf_counter() - start < 2.0  # a tenth of the speed measured on one core
