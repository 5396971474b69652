"""The ComfyUI nodes without ComfyUI: what its loader looks at, and a graph of them run by hand."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from twinflow_rt.errors import ConfigError, PromptTruncatedWarning
from twinflow_rt.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, Decode

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN"}
LINKS = {"LATENT", "IMAGE", "MASK", "TWINFLOW_MODEL", "TWINFLOW_PROMPT"}


def node(name: str):
    """Runs a node as ComfyUI does: widgets at their defaults unless given, the function by its name."""
    kind = NODE_CLASS_MAPPINGS[name]
    inputs = kind.INPUT_TYPES()
    specs = {**inputs["required"], **inputs.get("optional", {})}
    defaults = {key: spec[1]["default"] for key, spec in specs.items() if len(spec) > 1 and "default" in spec[1]}

    def run(**given):
        assert set(given) <= set(specs), f"{name} has no inputs {set(given) - set(specs)}"
        (result,) = getattr(kind(), kind.FUNCTION)(**{**defaults, **given})
        return result

    return run


@pytest.fixture(scope="module")
def model():
    return node("TwinFlowLoad")(path="demo", device="cpu", dtype="float32")


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_node_is_declared_as_comfyui_reads_it(name):
    kind = NODE_CLASS_MAPPINGS[name]
    assert set(NODE_DISPLAY_NAME_MAPPINGS) == set(NODE_CLASS_MAPPINGS)
    assert kind.CATEGORY == "TwinFlow" and kind.DESCRIPTION and set(kind.RETURN_TYPES) <= LINKS
    inputs = kind.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional"}
    specs = {**inputs["required"], **inputs.get("optional", {})}
    parameters = inspect.signature(getattr(kind, kind.FUNCTION)).parameters
    assert set(parameters) == {"self", *specs}
    for key in inputs.get("optional", {}):
        assert parameters[key].default is not inspect.Parameter.empty
    for kind_of, *options in specs.values():
        if isinstance(kind_of, list):
            assert options[0]["default"] in kind_of
        else:
            assert kind_of in WIDGETS | LINKS
        if kind_of == "INT":
            assert options[0]["min"] <= options[0]["default"] <= options[0]["max"] < 2**64


def test_graph_gives_the_pipelines_images(model):
    prompt = node("TwinFlowEncode")(model=model, text="a red circle above a blue square")
    latent = node("TwinFlowSample")(model=model, prompt=prompt, seed=7, width=48, height=64, batch_size=3)
    vae = model.vae
    assert set(latent) == {"samples"} and latent["samples"].dtype == torch.float32
    assert latent["samples"].shape == (3, vae.channels, 64 // vae.scale, 48 // vae.scale)
    image = node("TwinFlowDecode")(model=model, samples=latent)
    assert image.shape == (3, 64, 48, 3) and image.dtype == torch.float32 and image.is_contiguous()
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.05
    want = model("a red circle above a blue square", seed=7, num_images=3, width=48, height=64, output="pt").images
    assert (image - want.permute(0, 2, 3, 1)).abs().max() <= 1e-4
    for tensor in (latent["samples"], image):  # as later nodes do
        tensor.requires_grad_(False).mul_(1)


def test_images_and_masks(model):
    prompt, seed = node("TwinFlowEncode")(model=model, text="a green triangle"), 3
    given = model("a red circle", seed=[1, 2], num_images=2, output="pt").images.movedim(1, -1)
    mask = torch.zeros(1, *given.shape[1:3])
    mask[..., :32] = 1
    sample = partial(node("TwinFlowSample"), model=model, prompt=prompt, seed=seed, batch_size=2)
    for more in ({}, {"mask": mask}):
        ours = node("TwinFlowDecode")(model=model, samples=sample(image=given, strength=0.8, **more))
        want = model(
            "a green triangle", seed=seed, num_images=2, image=given.movedim(-1, 1), strength=0.8, output="pt",
            mask=mask[:, None] if more else None,
        ).images.movedim(1, -1)  # fmt: skip
        painted = mask[0].bool() if more else torch.ones(64, 64, dtype=torch.bool)
        assert (ours - want).abs()[:, painted].max() <= 1e-4
    with pytest.raises(ConfigError, match="mask= goes with image="):
        sample(mask=mask)


def test_latents_are_the_vaes_own(model):
    """Raw, so that diffusers' decoder (as ComfyUI's) takes them as they are."""
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL.from_pretrained(model.folder / "vae")
    prompt = node("TwinFlowEncode")(model=model, text="a green cross")
    latent = node("TwinFlowSample")(model=model, prompt=prompt, seed=1)
    image = node("TwinFlowDecode")(model=model, samples=latent)
    with torch.no_grad():
        want = (vae.decode(latent["samples"]).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert (image - want).abs().max() <= 1e-4
    one_frame = {"samples": latent["samples"].unsqueeze(2)}
    assert torch.equal(node("TwinFlowDecode")(model=model, samples=one_frame), image)


def test_seed_and_evaluations(model):
    prompt, sample = node("TwinFlowEncode")(model=model, text="a red circle"), node("TwinFlowSample")
    pair = sample(model=model, prompt=prompt, seed=4, batch_size=2)["samples"]
    alone = sample(model=model, prompt=prompt, seed=5)["samples"]
    assert (pair[1] - alone[0]).abs().max() <= 1e-4 and (pair[0] - alone[0]).abs().max() > 0.1
    twice = sample(model=model, prompt=prompt, seed=5, nfe=2)["samples"]
    assert (twice - alone).abs().max() > 1e-2
    largest = NODE_CLASS_MAPPINGS["TwinFlowSample"].INPUT_TYPES()["required"]
    sample(model=model, prompt=prompt, seed=largest["seed"][1]["max"], batch_size=2, width=16, height=16)


def test_seeds_to_the_last(model):
    """ComfyUI's own sampler has seeds below 2^64, and draws them at random; after the last comes the first."""
    sample = node("TwinFlowSample")
    assert NODE_CLASS_MAPPINGS["TwinFlowSample"].INPUT_TYPES()["required"]["seed"][1]["max"] == 2**64 - 1
    given = {"model": model, "prompt": node("TwinFlowEncode")(model=model, text="a"), "width": 16, "height": 16}
    pair = sample(**given, seed=2**64 - 1, batch_size=2)["samples"]
    for latent, seed in zip(pair, (2**64 - 1, 0), strict=True):
        assert (latent - sample(**given, seed=seed)["samples"][0]).abs().max() <= 1e-4
    for seed, count in ((2**64, 1), (-1, 1), ("1", 1), (2**64 - 1, 10**12), (0, 0), (0, "1")):
        with pytest.raises(ConfigError, match=r"seed|batch_size|images"):
            sample(**given, seed=seed, batch_size=count)


@pytest.mark.parametrize("text", [None, 3, ["a"], "\ud800", "x" * 100_001])
def test_prompts_are_checked_as_the_pipeline_does(model, text):
    with pytest.raises(ConfigError, match="prompt"):
        node("TwinFlowEncode")(model=model, text=text)


def test_prompts_that_are_cut_are_told(model):
    with pytest.warns(PromptTruncatedWarning, match="the end"):
        embeds = node("TwinFlowEncode")(model=model, text="word " * 900 + "the end")
    assert embeds.truncated == (True,)


def test_latents_of_another_model_are_refused(model):
    with pytest.raises(ConfigError, match="are not this model's"):
        Decode().decode(model, {"samples": torch.zeros(1, model.vae.channels + 1, 4, 4)})
    with pytest.raises(ConfigError, match="are not this model's"):
        Decode().decode(model, {"samples": torch.zeros(1, model.vae.channels, 2, 4, 4)})


def test_comfyuis_stop_button_stops(model, monkeypatch):
    class InterruptProcessingException(Exception):
        pass

    def throw():
        raise InterruptProcessingException

    comfy = SimpleNamespace(throw_exception_if_processing_interrupted=throw)
    monkeypatch.setitem(sys.modules, "comfy.model_management", comfy)
    prompt = node("TwinFlowEncode")(model=model, text="a")
    with pytest.raises(InterruptProcessingException):
        node("TwinFlowSample")(model=model, prompt=prompt)
    comfy.throw_exception_if_processing_interrupted = lambda: None
    assert node("TwinFlowSample")(model=model, prompt=prompt)["samples"].shape[0] == 1


def test_the_documented_file_is_a_node_pack(tmp_path):
    """docs/comfyui.md's `__init__.py`, loaded from custom_nodes as ComfyUI does."""
    text = (Path(__file__).parents[2] / "docs" / "comfyui.md").read_text()
    file = tmp_path / "twinflow" / "__init__.py"
    file.parent.mkdir()
    file.write_text(text.partition("```python\n")[2].partition("```")[0])
    spec = importlib.util.spec_from_file_location("twinflow_nodes", file)
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS == NODE_CLASS_MAPPINGS
    assert module.NODE_DISPLAY_NAME_MAPPINGS == NODE_DISPLAY_NAME_MAPPINGS


def test_nothing_of_comfyui_is_imported():
    code = "import sys, twinflow_rt.integrations.comfyui; print([m for m in sys.modules if m.startswith('comfy')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
