"""The checker accepts what the captions ask for and refuses what they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from twinflow_rt.errors import ConfigError
from twinflow_rt.evaluate import Detection, check, contact_sheet, detect, examine, score
from twinflow_rt.evaluate.check import relations
from twinflow_rt.training.scenes import COLORS, KINDS, SHAPES, Requirement, Scene, SceneObject, prompts, render

pytest.importorskip("scipy")
SCENES = [s for kind in KINDS for split in ("train", "heldout") for s in prompts(kind, 25, split, seed=5)]


def shown(scene: Scene, **changes: object) -> np.ndarray:
    """The scene's picture with fields of every object replaced."""
    return render(replace(scene, objects=tuple(replace(o, **changes) for o in scene.objects)))


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image.astype(np.float32), (sigma, sigma, 0)).round().astype(np.uint8)


def test_every_rendered_scene_is_right_and_measured():
    result = score([render(s) for s in SCENES], SCENES)
    assert all(share >= 0.98 for share in result.per_kind.values()), str(result)
    assert set(result.per_kind) == set(KINDS) and result.images == len(SCENES)
    for verdict, scene in zip(result.verdicts, SCENES, strict=True):
        found = sorted(verdict.detections, key=lambda d: (d.cx, d.cy))
        for d, o in zip(found, sorted(scene.objects, key=lambda o: (o.cx, o.cy)), strict=True):
            assert (d.shape, d.color) == (o.shape, o.color)
            assert max(abs(d.cx - o.cx), abs(d.cy - o.cy), abs(d.size - o.size)) < 0.7


@pytest.mark.parametrize("sigma, noise", [(0.8, 0), (0, 15), (0.6, 10)])
def test_blur_and_noise_of_a_generator_are_borne(sigma, noise):
    rng = np.random.default_rng(0)
    images = [blurred(render(s), sigma) + rng.normal(0, noise, (64, 64, 3)) for s in SCENES[::3]]
    result = score([i.clip(0, 255).astype(np.uint8) for i in images], SCENES[::3])
    assert result.mean >= 0.97, str(result)


def test_any_image_size_works():
    assert all(check(render(s, size), s).correct for s in SCENES[::20] for size in (48, 128))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("size", [12.0, 26.5])
def test_each_shape_and_color_is_told_apart(shape, color, size):
    scene = Scene("single", "", (SceneObject(shape, color, 30.4, 31.7, size),), ())
    (found,) = detect(render(scene))
    assert (found.shape, found.color) == (shape, color)


def other(scene: Scene, field: str, among) -> dict[str, object]:
    """One of `among` that no object of the scene has."""
    return {field: next(x for x in among if x not in {getattr(o, field) for o in scene.objects})}


def swapped(scene: Scene, *fields: str) -> np.ndarray:
    """The picture of a scene of two objects that have each other's fields."""
    a, b = scene.objects
    take = lambda o, giver: replace(o, **{name: getattr(giver, name) for name in fields})
    return render(replace(scene, objects=(take(a, b), take(b, a))))


WRONG = {
    "color": (prompts("colors", 12) + prompts("attribution", 12), lambda s: shown(s, **other(s, "color", COLORS))),
    "swapped colors": (prompts("attribution", 20), lambda s: swapped(s, "color")),
    "shape": (SCENES[::4], lambda s: shown(s, **other(s, "shape", SHAPES))),
    "one object less": (SCENES[::4], lambda s: render(replace(s, objects=s.objects[1:]))),
    "swapped positions": (prompts("position", 20), lambda s: swapped(s, "cx", "cy")),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_was_not_asked_is_refused(kind):
    scenes, picture = WRONG[kind]
    for scene in scenes:
        verdict = check(picture(scene), scene)
        assert not verdict.correct and (kind != "swapped positions" or scene.relation in verdict.reason)


def test_counting_refuses_one_more_even_in_another_color():
    o = [SceneObject("square", "blue", x, y, 14) for x, y in ((16, 16), (48, 16), (16, 48))]
    asked = Scene("counting", "two blue squares", tuple(o[:2]), (Requirement("square", "blue", 2),))
    assert check(render(asked), asked).correct
    for color in ("blue", "red"):
        more = replace(asked, objects=(*o[:2], replace(o[2], color=color)))
        assert check(render(more), asked).reason == "3 square instead of 2"


def test_further_objects_are_allowed_outside_counting():
    single = prompts("single", 1)[0]
    o = replace(single.objects[0], size=12.0)
    more = replace(single, objects=(replace(o, cx=16, cy=16), replace(o, cx=45, cy=45)))
    assert check(render(more), single).correct


def test_touching_objects_of_different_color_are_two():
    o = (SceneObject("square", "blue", 20, 32, 18), SceneObject("circle", "red", 38, 32, 18))
    scene = Scene("two", "", o, (Requirement("square", "blue"), Requirement("circle", "red")))
    assert check(render(scene), scene).correct


@pytest.mark.parametrize("scene", [prompts(kind, 1)[0] for kind in KINDS], ids=KINDS)
def test_blank_noise_and_stains_are_refused(scene):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stain = blurred(noise, 3)  # smooth random blobs
    stripes = np.full((64, 64, 3), 238, np.uint8)
    stripes[20:28] = COLORS["red"]
    for image in (np.zeros_like(noise), np.full_like(noise, 238), noise, stain, stripes):
        assert not check(image, scene).correct


def test_relation_margin_and_diagonal():
    def at(x: float, y: float) -> Detection:
        return Detection("circle", "red", x, y, 20, 1)

    assert relations(at(0, 0), at(30, 0)) == {"left of"}
    assert relations(at(0, 0), at(0, -30)) == {"below"}
    assert relations(at(0, 0), at(30, 30)) == {"left of", "above"}
    assert relations(at(0, 0), at(30, 16)) == {"left of"}
    assert relations(at(0, 0), at(3.9, 0)) == set()  # less than 0.1 x (20 + 20)
    assert relations(at(0, 0), at(0, 0)) == set()


def test_scores_average_over_kinds_and_count_confusions():
    a, b, c = prompts("colors", 1)[0], prompts("counting", 1)[0], prompts("colors", 2)[1]
    blank = np.full((64, 64, 3), 238, np.uint8)
    result = score([render(a), render(b), blank], [a, b, c])
    assert result.per_kind == {"counting": 1.0, "colors": 0.5} and result.mean == 0.75
    n, color = b.required[0].count, a.required[0].color
    assert result.confusion["count"] == {(n, n): 1}
    assert result.confusion["color"] == {(color, color): 1, (c.required[0].color, None): 1}
    assert "mean 0.750 (3 images)" in str(result)


def test_examine_asks_for_each_kind_and_scores_the_answer():
    asked = []

    def generate(captions: list[str]) -> list[np.ndarray]:
        asked.extend(captions)
        return [render(s) for kind in KINDS for s in prompts(kind, 2, "train", 9)]

    assert examine(generate, per_kind=2, split="train", seed=9).mean == 1.0
    assert len(asked) == 2 * len(KINDS)


def test_bad_arguments_are_refused():
    scene = SCENES[0]
    with pytest.raises(ConfigError, match="one image per scene"):
        score([], SCENES)
    with pytest.raises(ConfigError, match="uint8"):
        check(np.zeros((3, 64, 64), np.float32), scene)
    with pytest.raises(ConfigError, match="one each"):
        contact_sheet([render(scene)], SCENES[:2])


def test_contact_sheet_shows_images_and_verdicts():
    scenes = SCENES[:5]
    images = [render(s) for s in scenes[:4]] + [np.full((64, 64, 3), 238, np.uint8)]
    sheet = np.asarray(contact_sheet(images, scenes, columns=3))
    assert sheet.shape == (2 * 184, 3 * 176, 3)
    frame = sheet[5, 24:26].tolist(), sheet[184 + 5, 176 + 24 : 176 + 26].tolist()
    assert frame == ([[20, 120, 50]] * 2, [[190, 30, 30]] * 2)


DEMO = Path(__file__).parents[2] / "twinflow_rt" / "demo"


@pytest.mark.skipif(not (DEMO / "vae").exists(), reason="the shipped demo is absent")
def test_shipped_autoencoder_keeps_every_answer():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL.from_pretrained(DEMO / "vae", torch_dtype=torch.float32).eval()
    images = np.stack([render(s) for s in SCENES[::2]])
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
    back = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    result = score(list(back), SCENES[::2])
    assert result.mean >= 0.98, str(result)
