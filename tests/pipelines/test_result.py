"""What a call returns, and how pipelines, plans and results show themselves."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests.factory import make_model
from twinflow_rt.checkpoint.image_files import CHUNK
from twinflow_rt.errors import ConfigError
from twinflow_rt.loading import load

SMALL = {"height": 16, "width": 24, "seed": 3}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load(make_model(tmp_path_factory.mktemp("result") / "m"), device="cpu")


def test_results_are_sequences_of_their_images(pipe):
    result = pipe(["a", "b"], **SMALL)
    assert len(result) == 2 and list(result) == result.images and result[-1] is result.images[1]
    assert result[:1] == result.images[:1]
    assert repr(result).startswith("Result(2 of output 'pil', seeds 3, 4, ") and len(repr(result)) < 80
    arrays = pipe("a", num_images=6, output="np", **SMALL)
    assert all(np.array_equal(x, y) for x, y in zip(arrays, arrays.images, strict=True))
    assert "seeds 3, 4, 5, 6, ..., " in repr(arrays)


@pytest.mark.parametrize("output", ["pil", "np", "pt"])
def test_every_kind_of_images_is_saved_alike(pipe, tmp_path, output):
    pixels = pipe(["a", "b"], output="np", **SMALL).images
    result = pipe(["a", "b"], output=output, **SMALL)
    files = result.save(tmp_path / "x.png")
    assert [file.name for file in files] == ["x-0.png", "x-1.png", "x-grid.png"]
    for file, array, seed in zip(files, pixels, (3, 4), strict=False):
        image = Image.open(file)
        assert json.loads(image.text[CHUNK]) == {"seed": seed}
        assert np.abs(np.asarray(image).astype(int) - array).max() <= (output == "pt")  # rounded twice
    assert pipe("a", output=output, **SMALL).save(str(tmp_path / "one.webp")) == [tmp_path / "one.webp"]
    shown = Image.open(BytesIO(result._repr_png_()))
    assert shown.size == (48, 16) and np.array_equal(np.asarray(shown), np.asarray(Image.open(files[-1])))
    html = result._repr_html_()
    assert html.startswith('<figure><img src="data:image/png;base64,') and "seeds 3, 4" in html


def test_latents_are_no_pictures(pipe, tmp_path):
    result = pipe("a", output="latent", **SMALL)
    assert result._repr_png_() is None and result._repr_html_() is None
    with pytest.raises(ConfigError, match="output='pil'"):
        result.save(tmp_path / "x.png")
    for name in ("x.txt", "nowhere/x.png", ""):
        with pytest.raises(ConfigError):
            pipe("a", **SMALL).save(name)


@pytest.mark.parametrize("output", ["pt", "latent"])
def test_tensors_are_ordinary(pipe, output):
    """Changed in place and differentiated, outside any mode; another call changes none of them."""
    seen = []
    images = pipe("a", output=output, callback=lambda done, total, x0: seen.append(x0), **SMALL).images
    for tensor in (images, *seen):
        before = tensor.clone()
        pipe("b", output=output, **{**SMALL, "seed": 8})
        assert torch.equal(tensor, before) and not tensor.is_inference()
        tensor.mul_(2).requires_grad_()
        tensor.square().sum().backward()
        assert torch.equal(tensor.grad, 4 * before)


def test_callbacks_may_differentiate(pipe):
    grads = []

    def callback(done, total, x0):
        x0.requires_grad_().square().sum().backward()
        grads.append(x0.grad)

    pipe("a", callback=callback, **SMALL)
    assert grads[0].abs().sum() > 0


def test_pipelines_and_plans_say_what_they_are(pipe, tmp_path):
    lines = repr(pipe).splitlines()
    assert len(lines) == 5 and str(pipe.folder) in lines[0] and all(len(line) < 200 for line in lines[1:])
    assert "arithmetic  float32; text encoder float32; on cpu" in lines[1] and "1 evaluation per image" in lines[2]
    short = repr(pipe.plan)
    assert short.startswith("Plan(z-image from m: float32, on cpu; 1 evaluation(s), ") and "\n" not in short
    assert str(pipe.plan).splitlines()[1] == "precision    float32"
    made = load(pipe.folder, device="cpu", precision="int8", text_precision="int8", nfe=2, memory_budget="1GB")
    assert "int8 linear layers, float32 otherwise; text encoder int8; on cpu, within 0.0" in repr(made)
    assert "2 evaluations per image" in repr(made) and made.plan.arithmetic == "int8 linear layers, float32 otherwise"


def test_what_auto_chose_is_said(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = load(pipe.folder, device="cpu", precision="auto").plan
    assert plan.arithmetic == "float32 (chosen by auto)" and "chosen by auto" in repr(plan)
    assert "note         auto chose float32: nothing was measured that is faster here" in str(plan)
    assert "note         auto: int8 was not measured here" in str(plan)
