"""Backends that plan per shape, on a CPU: a backend that writes down what it had to plan for, and when."""

from __future__ import annotations

import pytest

from twinflow_rt import ops
from twinflow_rt.bench.random_weights import temporary
from twinflow_rt.errors import ConfigError
from twinflow_rt.loading import load
from twinflow_rt.ops.implementations import IMPLEMENTATIONS, Implementation
from twinflow_rt.ops.selection import Choice
from twinflow_rt.planning import warm_up as warm


@pytest.fixture
def planned(monkeypatch):
    """Shapes that the attention of pipelines loaded meanwhile has planned for, in order."""
    shapes = []

    def attention(q, k, v, lengths=None):
        shape = (*q.shape[:2], k.shape[1], *q.shape[2:])
        if lengths is None and shape not in shapes:
            shapes.append(shape)
        return q.flatten(2)

    monkeypatch.setitem(IMPLEMENTATIONS["attention"], "planner", Implementation("planner", lambda: attention))
    monkeypatch.setattr(warm, "PLANS_PER_SHAPE", ("planner",))
    original = ops.select
    monkeypatch.setattr("twinflow_rt.compile.select", lambda target: original(target, prefer="planner"))
    return shapes


def test_loading_plans_for_the_first_calls(planned):
    """One image of the default size, short or long prompt: nothing is left to plan. Other sizes on request."""
    pipe = load("demo", device="cpu")
    ready = list(planned)
    assert ready
    for prompt in ("a circle", "a red circle above a very large blue square " * 2):
        pipe(prompt, output="latent")
    assert planned == ready
    assert pipe.warm_up(64, 96, num_images=2) > 0
    ready = list(planned)
    pipe(["a circle", "a square"], height=64, width=96, output="latent")
    assert planned == ready
    with pytest.raises(ConfigError, match="tokens"):
        pipe.warm_up(tokens=0)


def test_cross_attention_has_fewer_keys_than_queries(planned):
    with temporary("sana", scale=0.02, layers=1) as folder:
        pipe = load(folder, device="cpu", dtype="float32")
    assert planned == []  # every length of a prompt is a shape: too many to hold up loading for
    assert pipe.warm_up(tokens=3) == 3
    queries = (pipe.sizes.default // pipe.vae.scale) ** 2
    assert [shape[:3] for shape in planned] == [(1, queries, n) for n in (1, 2, 3)]


@pytest.mark.parametrize("family, loaded, more", [("qwen-image", 0, 4), ("sd3.5-m", 3, 0)])
def test_prompts_of_few_lengths_are_prepared_for_by_loading(planned, family, loaded, more):
    """Qwen-Image's last block asks with fewer queries: two shapes a length."""
    with temporary(family, scale=0.05, layers=2) as folder:
        pipe = load(folder, device="cpu", dtype="float32")
    assert len(planned) == loaded
    pipe.warm_up(tokens=2)
    assert len(planned) == loaded + more


def test_what_needs_no_plan_is_left_alone():
    assert load("demo").warm_up() == 0
    assert warm.plans_per_shape((Choice("attention", "cudnn"),))
    assert not warm.plans_per_shape((Choice("attention", "triton"), Choice("attention.ragged", "cudnn")))


def test_prompt_lengths():
    lengths = warm.prompt_lengths(992)
    assert lengths == tuple(range(32, 993, 32)) and warm.prompt_lengths(77) == (32, 64, 77)
