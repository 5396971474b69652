"""Classifier-free guidance and negative prompts, against diffusers' pipelines on the same files."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch

from tests.flux2_factory import make_model
from tests.networks import relative
from tests.pipelines.plain_models import theirs
from tests.pipelines.references import MODELS, PROMPTS
from twinflow_rt import cli
from twinflow_rt.errors import ConfigError
from twinflow_rt.loading import load
from twinflow_rt.sampling.guidance import Guidance
from twinflow_rt.sampling.schedule import SamplerConfig
from twinflow_rt.stages.prompt_cache import context_bytes

SCALE = {"z-image": "guidance_scale", "qwen-image": "true_cfg_scale", "sd3-without-t5": "guidance_scale",
         "sana": "guidance_scale"}  # fmt: skip
NEGATIVE = ["blurry, Ugly", "", "a long list of what is not wanted, word by word, at length"]
ARGS = {"height": 16, "width": 32, "seed": 3, "nfe": 2, "output": "latent"}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prompts cut by SD3.5's short miniature
        yield


@pytest.mark.parametrize("negative", [NEGATIVE, ["", "", ""]])
@pytest.mark.parametrize("scale", [1.5, 4.5])
@pytest.mark.parametrize("name", SCALE)
def test_equals_diffusers_pipeline(plain_pipes, name, scale, negative, monkeypatch):
    ours, peer = plain_pipes(name)
    size, seeds = MODELS[name].sizes[-1], [3, 4, 5]
    expected = theirs(
        name, peer, seeds, size, 4, monkeypatch, negative_prompt=list(negative), **{SCALE[name]: scale}
    )
    how = {"height": size[0], "width": size[1], "seed": seeds, "nfe": 4, "output": "latent"}
    found = ours(PROMPTS, guidance=scale, negative_prompt=negative if any(negative) else None, **how).images
    assert relative(found, expected) < 1e-5
    assert relative(ours(PROMPTS, **how).images, expected) > 1e-3


@pytest.mark.parametrize(("normalization", "truncation"), [(1.0, 1.0), (0.9, 0.5), (0.0, 0.2)])
def test_normalization_and_truncation_are_z_images(plain_pipes, normalization, truncation, monkeypatch):
    ours, peer = plain_pipes("z-image")
    more = {"guidance_scale": 3.0, "cfg_normalization": normalization, "cfg_truncation": truncation}
    expected = theirs("z-image", peer, [3, 4], (24, 80), 4, monkeypatch, **more)
    guidance = Guidance(3.0, normalization, truncation)
    found = ours(PROMPTS[:2], height=24, width=80, seed=[3, 4], nfe=4, output="latent", guidance=guidance).images
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("name", SCALE)
def test_images_are_guided_one_by_one(plain_folder, plain_pipes, name):
    """In parts, repeated, from embeddings, by diffusers' names, and with the branches one after the other."""
    ours, _ = plain_pipes(name)
    args = ARGS | {"guidance": 3.0}
    both = ours(PROMPTS[:2], num_images=2, negative_prompt=NEGATIVE[:2], **args).images
    for k in range(4):
        alone = ours(PROMPTS[k // 2], negative_prompt=NEGATIVE[k // 2], **args | {"seed": 3 + k}).images
        assert relative(both[k : k + 1], alone) < 1e-5
    embeds = ours.text(PROMPTS[:2])
    renamed = {SCALE[name]: 3.0, **{k: v for k, v in args.items() if k != "guidance"}}
    named = ours(embeds, num_images=2, negative_prompt_embeds=ours.text.encode_negative(NEGATIVE[:2]), **renamed)
    assert relative(named.images, both) < 1e-5
    budgeted = load(plain_folder(name), device="cpu", memory_budget="2GB", largest=(16, 32, 4))
    assert relative(budgeted(PROMPTS[:2], num_images=2, negative_prompt=NEGATIVE[:2], **args).images, both) < 1e-5
    ours.batch_invariant = True
    try:
        assert relative(ours(PROMPTS[:2], num_images=2, negative_prompt=NEGATIVE[:2], **args).images, both) < 1e-5
    finally:
        ours.batch_invariant = False


@pytest.mark.parametrize("name", SCALE)
def test_budgets_count_negative_prompts(plain_folder, tmp_path, name):
    """Of models that may be guided: one context more per image, of the longest prompt."""
    folder, how = shutil.copytree(plain_folder(name), tmp_path / "m"), {"device": "cpu", "largest": (16, 32, 4)}
    guided = load(folder, memory_budget="2GB", **how)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    distilled = load(folder, memory_budget="2GB", **how)
    longest = guided.text(["word " * 5000])
    context = guided.velocity.encode(longest).select([0] * 4)
    found = {stage: size - distilled.memory.work[stage] for stage, size in guided.memory.work.items()}
    assert found["sample"] == found["decode"] == context_bytes(context) > 0


@pytest.mark.parametrize("name", SCALE)
def test_scales_that_change_nothing(plain_pipes, name):
    ours, plain = plain_pipes(name)[0], plain_pipes(name)[0]("x", **ARGS).images
    least = 0 if name == "z-image" else 1
    for how in ({"guidance": least}, {"guidance": -1.0}, {"negative_prompt": ""}, {"negative_prompt": [" "]}):
        assert torch.equal(ours("x", **how, **ARGS).images, plain)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"guidance": float("nan")}, "guidance must be a finite number"), ({"guidance": "4"}, "guidance must be"),
        ({"guidance": float("inf")}, "guidance must be"), ({"guidance": True}, "guidance must be"),
        ({"negative_prompt": "blurry"}, "negative_prompt needs guidance above 1"),
        ({"negative_prompt": "blurry", "guidance": 1.0}, "negative_prompt needs guidance above 1"),
        ({"negative_prompt": ["a", "b"], "guidance": 2.0}, "2 negative prompts for 1"),
        ({"negative_prompt": 3, "guidance": 2.0}, "prompt must be a string"),
        ({"negative_prompt": [], "guidance": 2.0}, "empty list"),
    ],
)  # fmt: skip
def test_guidance_that_cannot_be(plain_pipes, how, match):
    with pytest.raises(ConfigError, match=match):
        plain_pipes("sana")[0]("x", **how, **ARGS)


@pytest.mark.parametrize("settings", [(float("nan"),), (1.0, -1.0), (1.0, 0.0, "x"), (None,), (1.0, 0.0, -0.1)])
def test_settings_that_cannot_be(settings):
    with pytest.raises(ConfigError, match=r"(?i)guidance"):
        Guidance(*settings)


def test_what_was_trained_for_none_says_so(plain_folder, plain_pipes, tmp_path):
    sprint = plain_pipes("sana-sprint")[0]
    twin = load(MODELS["z-image"].make(tmp_path / "m"), device="cpu")
    klein = load(make_model(tmp_path / "k"), device="cpu")
    within, none = "part of its network", "TwinFlow's models need no guidance"
    for ours, match in ((sprint, within), (klein, within), (twin, none)):
        for how in ({"guidance": 4.5}, {"negative_prompt": "blurry"}):
            with pytest.raises(ConfigError, match=match):
                ours("x", height=16, width=32, **how)
        assert ours("x", height=16, width=32, guidance=1.0, negative_prompt="").images
    multi = SamplerConfig(2, mode="multi")  # TwinFlow's networks as flow models
    how = {"height": 16, "width": 32, "seed": 1, "sampler": multi, "output": "latent"}
    assert relative(twin("x", guidance=3.0, **how).images, twin("x", **how).images) > 1e-3


def test_commands(plain_folder, tmp_path, capsys):
    command = ["generate", "x", "--model", str(plain_folder("sana")), "--device", "cpu", "--nfe", "2", "--size", "16"]
    command += ["-o", str(tmp_path / "a.png")]
    assert cli.main([*command, "--guidance", "4.5", "--negative-prompt", "blurry"]) == 0
    assert cli.main([*command, "--negative-prompt", "blurry"]) == 2
    assert "negative_prompt needs guidance" in capsys.readouterr().err
