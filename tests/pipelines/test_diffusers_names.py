"""Names that callers know from diffusers: taken where they mean the same, else one line says what to use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import twinflow_rt
from tests.factory import make_model
from twinflow_rt.config import CALL_NAMES, LOAD_NAMES, METHODS
from twinflow_rt.errors import ConfigError
from twinflow_rt.loading import load

SMALL = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load(make_model(tmp_path_factory.mktemp("names") / "m"), device="cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_call_written_for_diffusers_makes_the_same_images(pipe):
    ours = pipe("a", nfe=2, num_images=2, seed=[7, 9], output="pt", **SMALL)
    theirs = pipe.to("cpu").to(torch.float32)(
        prompt="a", num_inference_steps=2, num_images_per_prompt=2, generator=[seeded(7), seeded(9)], output_type="pt",
        guidance_scale=1.0, negative_prompt="", return_dict=True, latents=None, **SMALL,
    )  # fmt: skip
    assert torch.equal(theirs.images, ours.images) and theirs.seeds == [7, 9]
    assert pipe(prompt_embeds=pipe.text(["a"]), true_cfg_scale=np.float32(0), **SMALL).images


def test_generators_are_their_seed_once(pipe):
    """A generator gives its own noise, which is that of its seed; the second call would give diffusers other noise."""
    generator = seeded(7)
    assert pipe("a", generator=generator, **SMALL).seeds == pipe("a", seed=seeded(7), **SMALL).seeds == [7]
    with pytest.raises(ConfigError, match="drawn numbers before: make a new one"):
        pipe("a", generator=generator, **SMALL)
    fresh = seeded(8)
    for wrong in ({"num_images": 2}, {"nfe": 0}, {"width": 17}, {"output": "x"}, {"preview": True}):
        with pytest.raises(ConfigError):
            pipe("a", generator=fresh, **{**SMALL, **wrong})
    assert pipe("a", generator=fresh, **SMALL).seeds == [8]  # calls that were refused took nothing from it


@pytest.mark.parametrize(("given", "message"), [
    ({"guidance_scale": 4.5}, "need no guidance"), ({"negative_prompt": "blurry"}, "need no guidance"),
    ({"negative_prompt": ["", "blurry"]}, "need no guidance"), ({"output_type": "np"}, "uint8"),
    ({"output_type": "latent"}, "normalised"), ({"return_dict": False}, r"pipe\(...\)\[0\]"),
    ({"latents": torch.zeros(1)}, "seed="), ({"prompt_embeds": torch.zeros(1)}, "pipe.text"),
    ({"callback_on_step_end": print}, "callback=f"), ({"num_inference_steps": 0}, "nfe"),
    ({"num_images_per_prompt": 2, "generator": torch.Generator()}, "one per image"),
])  # fmt: skip
def test_what_means_something_else_says_what_to_use(pipe, given, message):
    prompt = {} if "prompt_embeds" in given else {"prompt": "a"}
    with pytest.raises(ConfigError, match=message):
        pipe(**prompt, **SMALL, **given)


def test_unknown_and_doubled_names_are_type_errors(pipe):
    with pytest.raises(TypeError, match="hieght"):
        pipe("a", hieght=16)
    with pytest.raises(TypeError, match="give one of the two"):
        pipe("a", nfe=1, num_inference_steps=1)


def test_load_knows_the_names_of_from_pretrained(pipe):
    how = {"torch_dtype": torch.float32, "device_map": "cpu", "use_safetensors": True, "local_files_only": True}
    made = load(pretrained_model_name_or_path=pipe.folder, revision="main", cache_dir=None, **how)
    assert made.dtype == torch.float32 and made.device == pipe.device
    for name, value, message in (
        ("device_map", "balanced", "memory_budget"), ("revision", "x", "@revision"), ("cache_dir", "/x", "HF_HOME"),
        ("quantization_config", object(), "precision="), ("local_files_only", False, "download=True"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name}=.*{message}"):
            load(pipe.folder, **{name: value})


def test_devices_and_methods(pipe):
    assert pipe.to(torch.device("cpu"), torch.float32) is pipe.to(device="cpu", dtype=torch.float32) is pipe
    with pytest.raises(ConfigError, match=r"compiled for float32 on cpu: call load\(..., dtype='float16'\)"):
        pipe.to("cpu", torch.float16)
    for name, instead in METHODS.items():
        with pytest.raises(AttributeError) as refused:
            getattr(pipe, name)
        assert instead in str(refused.value)
    assert not hasattr(pipe, "foo")
    for where in (twinflow_rt, twinflow_rt.Pipeline):
        with pytest.raises((ConfigError, AttributeError), match=r"twinflow_rt\.load"):
            where.from_pretrained("x")


def test_every_name_leads_to_an_argument_or_a_way():
    import inspect

    for table, function in ((CALL_NAMES, twinflow_rt.Pipeline.__call__), (LOAD_NAMES, load)):
        parameters = inspect.signature(function).parameters
        for name, known in table.items():
            assert name not in parameters and (known.name in parameters or (not known.name and known.instead))
