"""Prompts seen before: the same images without the text encoder, within a budget of bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.factory import make_model
from twinflow_rt.loading import load
from twinflow_rt.models.context import Context
from twinflow_rt.stages.prompt_cache import PromptCache, context_bytes

ARGS = {"height": 16, "width": 24, "seed": 3, "output": "np"}
PROMPTS = ["a red circle", "two", "a red circle"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("prompts") / "m")


def context(rows):
    return Context(torch.zeros(1, rows, 5), (rows,))


def test_the_least_recently_used_go_first():
    cache = PromptCache(budget=3 * 20)
    made, network = [], torch.nn.Identity()

    def get(name, rows):
        return cache.get(name, network, lambda: made.append(name) or context(rows))

    first = get("a", 1)
    get("b", 1)
    assert get("a", 1) is first and cache.bytes == context_bytes(first) * 2 == 40
    get("c", 2)  # 40 bytes: b, the oldest in use, has to go
    assert get("a", 1) is first and cache.bytes == 60
    get("b", 1)
    assert made == ["a", "b", "c", "b"] and (cache.hits, cache.misses) == (2, 4)
    get("large", 99)
    assert cache.bytes == 0 and get("large", 99) is not None and made[-2:] == ["large", "large"]
    get("a", 1)
    network = torch.nn.Identity()
    assert get("a", 1) is not first and made[-2:] == ["a", "a"] and cache.bytes == 20


def test_known_prompts_skip_the_text_encoder(model):
    plain, pipe = load(model, device="cpu"), load(model, device="cpu", prompt_cache=1_000_000)
    encoded, encode = [], pipe.text.encode
    pipe.text.encode = lambda prompts: encoded.append(prompts) or encode(prompts)
    for seed in (3, 4):
        for prompts in (PROMPTS, PROMPTS[:1]):
            expected = plain(prompts, **{**ARGS, "seed": seed}).images
            assert np.array_equal(pipe(prompts, **{**ARGS, "seed": seed}).images, expected)
    assert encoded == [PROMPTS[:2], PROMPTS[:1]]
    assert (pipe.prompts.hits, pipe.prompts.misses) == (2, 2) and plain.prompts.hits == 0
    embeds = pipe.text(PROMPTS[:1])
    assert np.array_equal(pipe(embeds, **ARGS).images, plain(PROMPTS[:1], **ARGS).images)


def test_other_weights_forget_them(model, tmp_path):
    """An adapter on the prompt's refiner changes what was cached."""
    name = "transformer.context_refiner.0.attention.to_k"
    g = torch.Generator().manual_seed(0)
    factors = {"A": torch.randn(2, 48, generator=g), "B": torch.randn(48, 2, generator=g)}
    save_file({f"{name}.lora_{k}.weight": v for k, v in factors.items()}, tmp_path / "a.safetensors")
    pipe = load(model, device="cpu", prompt_cache=1_000_000)
    args = {**ARGS, "output": "latent"}
    before = pipe("a red circle", **args).images
    pipe.set_loras([tmp_path / "a.safetensors"])
    after = pipe("a red circle", **args).images
    expected = load(model, device="cpu", loras=[tmp_path / "a.safetensors"])("a red circle", **args)
    assert torch.equal(after, expected.images) and not torch.allclose(after, before, rtol=1e-3)
