"""The Python interface: arguments that cannot work, and ranges of every number it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import twinflow_rt
from tests.bad_input.conftest import refused
from twinflow_rt.config import MAX_PROMPT, SizeRule, resolve_dtype, resolve_prompts
from twinflow_rt.errors import ConfigError, DeviceError
from twinflow_rt.loading import load
from twinflow_rt.sampling.noise import MAX_SEEDS, resolve_seeds
from twinflow_rt.sampling.schedule import SamplerConfig, preset
from twinflow_rt.stages.text import PromptEmbeds

NAN, INF = float("nan"), float("inf")
PROMPTS = [
    (None, "must be a string"), (3, "must be a string"), (b"bytes", "must be a string"), ([], "empty list"),
    (["a", 3], "must be a string"), ({"a"}, "must be a string"), ("\ud800", "surrogate"), ("a\udcff", "surrogate"),
    (["good", "\udfff"], "surrogate"), ("x" * (MAX_PROMPT + 1), "at most 100,000"), ((), "empty list"),
    (np.array([1]), "must be a string"),
]  # fmt: skip
CALLS = [
    ({"height": 0}, "height 0"), ({"height": -16}, "height -16"), ({"width": 17}, "width 17"),
    ({"width": 16.0}, "width"), ({"height": True}, "height"), ({"height": "16"}, "height"),
    ({"width": 10**9}, "nearest is 256"), ({"width": 2**64}, "nearest is 256"), ({"height": NAN}, "height"),
    ({"height": [16]}, "height"), ({"seed": -1}, "seed"), ({"seed": True}, "seed"), ({"seed": 1.0}, "seed"),
    ({"seed": NAN}, "seed"), ({"seed": 2**64}, "seed"), ({"seed": "1"}, "seed"),
    ({"seed": [1, 2]}, "2 seeds for 1"), ({"seed": []}, "0 seeds for 1"), ({"seed": [None]}, "seed"),
    ({"seed": {1: 2}}, "seed"), ({"seed": np.float32(1)}, "seed"), ({"seed": 2**64 - 1, "num_images": 2}, "seed"),
    ({"seed": torch.ones(2)}, "seed"), ({"num_images": 0}, "num_images"), ({"num_images": -1}, "num_images"),
    ({"num_images": True}, "num_images"), ({"num_images": 1.5}, "num_images"), ({"num_images": None}, "num_images"),
    ({"num_images": 10**9}, "at most 10000"), ({"num_images": 2**70}, "at most 10000"),
    ({"num_images": "2"}, "num_images"), ({"nfe": 0}, "nfe"), ({"nfe": -1}, "nfe"), ({"nfe": True}, "nfe"),
    ({"nfe": 2.0}, "nfe"), ({"nfe": NAN}, "nfe"), ({"nfe": 101}, "nfe"), ({"nfe": 10**30}, "nfe"),
    ({"nfe": "2"}, "nfe"), ({"nfe": 1, "sampler": "2"}, "not both"), ({"sampler": "best"}, "no preset"),
    ({"sampler": 3}, "SamplerConfig"), ({"sampler": {}}, "SamplerConfig"), ({"output": "jpeg"}, "output"),
    ({"output": None}, "output"), ({"output": ["pil"]}, "output"),
]  # fmt: skip
SAMPLERS = [
    {"sampling_steps": 0}, {"sampling_steps": 1001}, {"sampling_steps": True}, {"sampling_steps": 1.0},
    {"stochast_ratio": NAN}, {"stochast_ratio": -0.1}, {"stochast_ratio": 1.1}, {"stochast_ratio": "sde"},
    {"stochast_ratio": True}, {"extrapol_ratio": INF}, {"extrapol_ratio": "0"}, {"sampling_order": 3},
    {"sampling_order": True}, {"time_dist_ctrl": (1, 1)}, {"time_dist_ctrl": (0, 1, 1)},
    {"time_dist_ctrl": (NAN, 1, 1)}, {"time_dist_ctrl": "111"}, {"rfba_gap_steps": (0.5, 0.5)},
    {"rfba_gap_steps": (-0.1, 0)}, {"rfba_gap_steps": None}, {"mode": "fast"}, {"mode": 1},
]  # fmt: skip
LOADS = [
    ({"device": "gpu"}, "not a device"), ({"device": "cuda:99"}, "absent"), ({"device": "meta"}, "not supported"),
    ({"device": "mps:0"}, "not supported"), ({"device": 1.5}, "not a device"), ({"device": ""}, "not a device"),
    ({"dtype": "int8"}, "dtype 'int8'"), ({"dtype": "float64"}, "dtype"), ({"dtype": torch.int32}, "dtype"),
    ({"dtype": ""}, "dtype"), ({"precision": "int3"}, "precision"), ({"precision": 8}, "precision"),
    ({"precision": "bf16", "dtype": "float32"}, "give one of the two"), ({"nfe": 0}, "nfe"),
    ({"nfe": 2, "sampler": "2"}, "not both"), ({"loras": "a.safetensors"}, "loras"), ({"loras": [("a", NAN)]}, "loras"),
    ({"loras": {"a": INF}}, "loras"), ({"loras": [("a", True)]}, "loras"), ({"loras": [("a",)]}, "loras"),
    ({"loras": [None]}, "loras"), ({"loras": ["nowhere.safetensors"]}, "does not exist"),
    ({"loras": ["a\0.safetensors"]}, "cannot be read"), ({"loras": ["x" * 5000]}, "cannot be read"),
]  # fmt: skip
PATHS = [
    ("", "model_index.json"), ("nowhere", "does not exist"), ("a\0b", "cannot be read"), ("x" * 5000, "cannot be read"),
    ("/dev/null", "single file"), ("hf:/", "no model of the hub"), ("hf://one", "no model of the hub"),
    ("hf://a/b@", "no model of the hub"), ("hf://a/../b", "no model of the hub"), ("hf://../x", "no model of the hub"),
    ("hf://a/b/../../c", "no model of the hub"), ("hf://a/b@c d", "no model of the hub"),
    ("hf://a/b@main@x", "no model"),
    ("hf://a/b//c", "no model of the hub"), ("hf://no-such/model-anywhere", "not in the local cache"),
]  # fmt: skip


ODD = ["", "\0", " " * 50_000, "\ufffe\uffff", "\u202e\u200d", "{{ 7 * 7 }}{% for %}", "🟥" * 999]


@pytest.mark.parametrize(("prompt", "message"), PROMPTS)
def test_prompts(pipe, prompt, message):
    refused(lambda: pipe(prompt, height=16, width=16), message, ConfigError)


@pytest.mark.parametrize("prompt", ODD)
def test_odd_prompts_are_prompts(pipe, prompt):
    """Unusual text is no error: it is tokenized like any other, and cut where the model stops reading."""
    images = pipe(prompt, height=16, width=16, seed=0, output="np").images
    assert images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(("arguments", "message"), CALLS)
def test_calls(pipe, arguments, message):
    refused(lambda: pipe("a", **{"height": 16, "width": 16, **arguments}), message, ConfigError)


@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
def test_samplers(settings):
    refused(lambda: SamplerConfig(**settings), next(iter(settings)), ConfigError)


@pytest.mark.parametrize(("arguments", "message"), LOADS)
def test_loads(source, arguments, message):
    refused(lambda: load(source, **{"device": "cpu", **arguments}), message)


@pytest.mark.parametrize(("path", "message"), PATHS)
def test_paths(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    refused(lambda: load(path, device="cpu"), message)


def embeds(pipe) -> PromptEmbeds:
    return pipe.text(["a red circle", "a"])


def nan_at_the_end(tensor):
    tensor = tensor.clone()
    tensor[-1, -1, -1] = NAN
    return tensor


EMBEDS = [
    (lambda e: {"embeds": e.embeds[0]}, "embeds must be a tensor"),
    (lambda e: {"embeds": e.embeds[..., :-1]}, "embeds must be a tensor"),
    (lambda e: {"embeds": e.embeds[:, :0]}, "embeds must be a tensor"),
    (lambda e: {"embeds": e.embeds[:0], "lengths": ()}, "embeds must be a tensor"),
    (lambda e: {"embeds": e.embeds.repeat(1, 100, 1)}, "embeds must be a tensor"),
    (lambda e: {"embeds": e.embeds.numpy()}, "embeds must be a tensor"),
    (lambda e: {"embeds": None}, "embeds must be a tensor"), (lambda e: {"embeds": e.embeds.int()}, "floating-point"),
    (lambda e: {"embeds": e.embeds.cfloat()}, "floating-point"),
    (lambda e: {"embeds": nan_at_the_end(e.embeds)}, "NaN or infinity"),
    (lambda e: {"embeds": e.embeds * INF}, "NaN or infinity"), (lambda e: {"lengths": (1,)}, "lengths must be 2"),
    (lambda e: {"lengths": (0, 1)}, "lengths must be"), (lambda e: {"lengths": (1, 10**6)}, "lengths must be"),
    (lambda e: {"lengths": (True, 1)}, "lengths must be"), (lambda e: {"lengths": None}, "lengths must be"),
    (lambda e: {"extras": {"pooled": e.embeds}}, "extras must be empty"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), EMBEDS)
def test_prompt_embeds(pipe, change, message):
    good = embeds(pipe)
    refused(lambda: pipe(replace(good, **change(good)), height=16, width=16), message, ConfigError)


def test_prompt_embeds_of_the_text_stage_are_taken(pipe):
    made = pipe(embeds(pipe), height=16, width=16, seed=1, output="np").images
    assert np.array_equal(made, pipe(["a red circle", "a"], height=16, width=16, seed=1, output="np").images)


def test_extras_of_families_that_have_some():
    probe = PromptEmbeds(torch.empty(1, 4, 8, device="meta"), (4,), {"pooled": torch.empty(1, 6, device="meta")})
    good = PromptEmbeds(torch.zeros(2, 4, 8), (4, 4), {"pooled": torch.zeros(2, 6)})
    good.check(probe, 2)
    for extras, message in (
        ({}, "extras must be pooled, not empty"), ({"pooled": torch.zeros(2, 5)}, r"pooled must be .* \(2, 6\)"),
        ({"pooled": torch.zeros(2, 6).long()}, "pooled"), ({"pooled": torch.full((2, 6), NAN)}, "pooled holds NaN"),
    ):  # fmt: skip
        refused(lambda extras=extras: replace(good, extras=extras).check(probe, 2), message, ConfigError)


@pytest.mark.parametrize("bad", [None, object(), 3, "demo", torch.nn.Linear(1, 1)], ids=lambda bad: type(bad).__name__)
def test_what_is_no_diffusers_pipeline(bad):
    refused(lambda: twinflow_rt.accelerate(bad), "transformer", ConfigError)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file/folder"])
def test_artifacts_at_impossible_places(pipe, tmp_path, name):
    (tmp_path / "file").write_text("old")
    refused(lambda: pipe.save(tmp_path / name), "cannot be written")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# -- ranges ---------------------------------------------------------------------------------------


@given(st.one_of(st.integers(-(2**70), -1), st.integers(2**64, 2**70), st.floats(), st.booleans(), st.text(max_size=3)))
def test_every_seed_outside_the_range_is_refused(seed):
    refused(lambda: resolve_seeds(seed, 1), "seed", ConfigError)


@given(st.integers(0, 2**64 - 1))
def test_every_seed_inside_is_taken(seed):
    assert resolve_seeds(seed, 1) == [seed]


@given(st.one_of(st.integers(MAX_SEEDS + 1, 2**70), st.integers(max_value=0), st.floats(), st.booleans()))
def test_every_batch_beyond_the_limit_is_refused(count):
    refused(lambda: resolve_seeds(0, count), "positive integer|at most", ConfigError)


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=4)))
def test_every_size_is_taken_or_refused(value):
    rule = SizeRule(multiple=16, max_height=256, max_width=256, default=64)
    if value is None or (type(value) is int and 16 <= value <= 256 and value % 16 == 0):
        assert rule.resolve(value, None) == (value or 64, 64)
    else:
        refused(lambda: rule.resolve(value, None), "height", ConfigError)


@given(st.one_of(st.integers(max_value=0), st.integers(min_value=101), st.floats(), st.text(max_size=3), st.booleans()))
def test_every_nfe_beyond_the_presets_is_refused(nfe):
    refused(lambda: preset(nfe), "nfe", ConfigError)


@given(st.text(st.characters(exclude_categories=()), max_size=20))
def test_every_text_is_a_prompt_or_half_a_surrogate(text):
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        refused(lambda: resolve_prompts(text), "surrogate", ConfigError)
    else:
        assert resolve_prompts(text) == (text,)


@given(st.one_of(st.text(max_size=8), st.integers(), st.none()))
def test_every_other_dtype_is_refused(name):
    if name is not None and str(name) not in ("fp32", "fp16", "bf16", "half"):
        refused(lambda: resolve_dtype(name, torch.device("cpu"), torch.float32), "dtype", ConfigError)


def test_absent_devices_are_device_errors(source):
    refused(lambda: load(source, device="cuda:77"), "absent", DeviceError)


def test_paths_may_be_of_either_kind(source):
    assert load(str(source), device="cpu").folder == load(Path(source), device="cpu").folder
