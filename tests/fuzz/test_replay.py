"""The fuzzer's seeds and some hundred damages of them, the same in every run and without atheris."""

from __future__ import annotations

import json

import pytest

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import KINDS, SEEDS, TARGETS, Runner
from twinflow_rt.families import CONNECTOR
from twinflow_rt.plan import Plan
from twinflow_rt.sampling.schedule import PRESETS

DAMAGES = {"tensors": 300, "gguf": 300, "plan": 250, "config": 300, "index": 150}


def fresh_plan() -> bytes:
    """A plan of this version, whatever its schema is by now."""
    plan = Plan("z-image", "m", "cpu", "float32", ((1.0, 0.0),), (), 2, 1, 8, 4, folded={"a": 1}, notes=("b",))
    sampler = {**PRESETS["2"].__dict__, "time_dist_ctrl": [1.0, 1.0, 1.0], "rfba_gap_steps": [0.001, 0.6]}
    return json.dumps({"sampler": sampler, "plan": plan.to_dict()}).encode()


def seeds(name: str) -> list[bytes]:
    files = [path.read_bytes() for path in sorted((SEEDS / name).iterdir())]
    return [fresh_plan(), *files] if name == "plan" else files


@pytest.fixture
def run(request):
    runner = Runner(request.param)
    yield runner
    runner.close()


@pytest.mark.parametrize(("run", "name"), [(name, name) for name in TARGETS], indirect=["run"])
def test_seeds(run, name):
    """Each target takes some of its seeds and refuses others, so that damages start on either side."""
    answers = [run(seed) for seed in seeds(name)]
    assert "taken" in answers and len(set(answers)) > 1, answers


@pytest.mark.parametrize(("run", "name"), [(name, name) for name in TARGETS], indirect=["run"])
def test_damages(run, name):
    originals = seeds(name)
    answers = [run(mutated(originals[i % len(originals)], i)) for i in range(DAMAGES[name])]
    assert len(set(answers)) > 10, "the damages do not reach the checks"


@pytest.mark.full
@pytest.mark.parametrize(("run", "name"), [(name, name) for name in TARGETS], indirect=["run"])
def test_many_damages(run, name):
    originals = seeds(name)
    for i in range(20_000 if name != "config" else 5_000):
        run(mutated(originals[i % len(originals)], 1_000_000 + i))


def test_seeds_cover_every_network():
    contents = [json.loads(path.read_text()) for path in (SEEDS / "config").glob("*.json")]
    kinds = {*KINDS} - {CONNECTOR}  # whose config.json names no kind
    assert {c.get("_class_name") or c.get("model_type") for c in contents} >= kinds
