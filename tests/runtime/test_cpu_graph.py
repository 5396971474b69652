"""CPU graphs: what a call on a CPU did, played again. Bits are those of the call."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tests import factory
from tests.factory import FAMILIES, make_model
from tests.memory import least
from twinflow_rt.loading import load
from twinflow_rt.ops.conv import winograd_weight
from twinflow_rt.ops.native import norm
from twinflow_rt.ops.native.conv import conv_winograd
from twinflow_rt.runtime import capture
from twinflow_rt.runtime.capture import Captures
from twinflow_rt.runtime.cpu_graph import CpuGraph, CpuGraphs, Recorder
from twinflow_rt.runtime.tensor_tree import tensors_of

CPU = torch.device("cpu")
def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def recorded(function, *inputs):
    with torch.inference_mode():
        with Recorder(list(inputs)) as recorder:
            outputs = function(*inputs)
        return CpuGraph(recorder, tensors_of(outputs)), outputs


WEIGHT = draw(8, 8, seed=3)


def varied(x, y):
    """Results in lists, in place, of views, of lists of tensors, of nothing but numbers, and the input itself."""
    a, b = x.chunk(2, -1)
    c = torch.cat([a.transpose(0, 1), F.linear(y, WEIGHT)[:, :4].t()], 1).contiguous()
    c.add_(1).mul_(torch.arange(3.0).sum())
    for i in range(20):  # short-lived tensors, whose ids come again
        c = c + (c * i).relu() / 100
    h, w = x.new_ones(4, 1), norm.rms_norm(y, WEIGHT[0].abs(), 1e-5)
    return {"c": c * h, "b": b, "x": x, "pair": (w, torch.stack((b, a)).unbind(1)[0])}


def test_plays_what_was_written_down():
    inputs = draw(4, 8), draw(2, 8)
    graph, outputs = recorded(varied, *inputs)
    for seed in (5, 6):
        new = draw(4, 8, seed=seed), draw(2, 8, seed=seed)
        with torch.inference_mode():
            expected = tensors_of(varied(*(x.clone() for x in new)))
            for static, given in zip(inputs, new, strict=True):
                static.copy_(given)
            graph.play()
        got = tensors_of(outputs)
        assert len(got) == 5 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_keeps_constants_alive_and_lets_go_of_the_rest():
    x = draw(4, 8)
    graph, _ = recorded(lambda x: F.linear(x, WEIGHT * 2).relu().sum(0), x)
    with torch.inference_mode():
        graph.play()
    held = [value for value in graph.registers if isinstance(value, torch.Tensor)]
    assert {id(value) for value in held} == {id(x), id(WEIGHT)}


def test_what_changes_nothing_is_no_step():
    graph, _ = recorded(lambda x: x.float().to(torch.float32).contiguous() + 1, draw(2, 2))
    assert len(graph.steps) == 1


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x * x.sum().item(), "gave a number"),
        (lambda x: torch.add(x, x, out=torch.empty_like(x)), "by name"),
        (lambda x: conv_winograd(x, winograd_weight(draw(2, 2, 3, 3), False), None), "which no tracer sees"),
    ],
)
def test_what_cannot_be_played_runs_as_it_is(function, why):
    graphs, x = Captures(CpuGraphs(), kind="CPU graphs", longest=10), draw(1, 2, 4, 4)
    with torch.inference_mode():
        expected = function(x)
        for _ in range(3):
            assert torch.equal(graphs("s", function, function, x), expected)
    stats = graphs.stats()["s"]
    assert stats.recorded == stats.replayed == 0 and "recording failed" in stats.refused
    if torch.backends.mkldnn.is_available():
        assert why in stats.refused


def test_records_what_comes_again_and_is_short():
    calls, graphs = [], Captures(CpuGraphs(), kind="CPU graphs", longest=10)
    function = lambda x: calls.append(1) or x + 1
    for n, (count, kept) in enumerate([(1, 0), (2, 1), (2, 1), (2, 1)]):
        assert torch.equal(graphs("s", function, function, torch.full((3,), n)), torch.full((3,), n + 1))
        assert len(calls) == count and len(graphs._kept) == kept
    slow = Captures(CpuGraphs(), kind="CPU graphs", longest=0.0)
    for _ in range(3):
        slow("s", function, function, torch.zeros(3))
    assert slow.stats()["s"].recorded == 0 and "would not show" in slow.stats()["s"].refused
    assert "CPU graphs of s: 0 kept" in "\n".join(slow.notes())


def test_inference_mode_and_none_have_graphs_of_their_own():
    graphs, function = Captures(CpuGraphs(), longest=10), lambda x: x * 2
    for _ in range(3):
        with torch.inference_mode():
            assert graphs("s", function, function, torch.ones(2)).is_inference()
        assert not graphs("s", function, function, torch.ones(2)).is_inference()
    assert graphs.stats()["s"].kept == 2


def test_shapes_met_are_forgotten(monkeypatch):
    monkeypatch.setattr(capture, "SHAPES", 2)
    graphs, function = Captures(CpuGraphs(), longest=10), lambda x: x * 2
    for n in (1, 2, 3, 1):
        graphs("s", function, function, torch.ones(n))
    assert len(graphs._met) == 2 and not graphs._kept


@pytest.mark.parametrize("family", FAMILIES)
def test_pipelines_give_the_same_bits(family, tmp_path):
    folder = make_model(tmp_path / "m", family)
    plain, replayed = load(folder, device="cpu", capture="off"), load(folder, device="cpu")
    side = 2 * plain.sizes.multiple
    for prompts in (["a red circle"], ["a", "a blue square above a green one"]):
        for nfe in (1, 2):
            for seed in range(4):
                how = {"height": side, "width": side, "seed": seed, "nfe": nfe, "output": "pt"}
                images = [pipe(prompts, **how).images for pipe in (plain, replayed)]
                assert torch.equal(*images), (prompts, nfe, seed)
    stats = replayed.captures.stats()
    assert plain.captures is None and {"context", "velocity", "decode"} < {*stats}
    assert all(s.refused is None and s.replayed > 0 for s in stats.values()), stats
    assert "CPU graphs of velocity" in str(replayed.plan)


def test_a_changed_network_has_new_graphs(tmp_path):
    folder = factory.make_model(tmp_path / "m")
    plain, replayed = load(folder, device="cpu", capture="off"), load(folder, device="cpu")
    for pipe in (plain, replayed):
        for nfe in (1, 1, 1, 3, 3, 1):
            pipe("a", seed=0, nfe=nfe)
    with torch.no_grad():
        for pipe in (plain, replayed):
            pipe.set_loras([])
    images = [pipe("a", seed=0, output="pt").images for pipe in (plain, replayed)]
    assert torch.equal(*images)


def test_a_memory_budget_on_a_cpu_has_none(tmp_path):
    folder = factory.make_model(tmp_path / "m")
    assert load(folder, device="cpu", memory_budget=least(folder, device="cpu")).captures is None


def test_recording_imports_no_compiler():
    script = """
import sys, torch, twinflow_rt
pipe = twinflow_rt.load("demo", device="cpu")
pipe.captures.longest = 10  # on a busy machine, too
for seed in range(3):
    pipe("a red circle", seed=seed)
assert pipe.captures.stats()["decode"].replayed == 2, pipe.captures.stats()
assert not {"torch._dynamo", "sympy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
