"""Sustained load (`benches/load.py`): nothing lost, nothing mixed up, memory flat."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benches import load as bench
from tests.serve.conftest import served
from tests.serve.fake import FakePipe
from twinflow_rt.loading import load
from twinflow_rt.serve.settings import Limits

SIZES = [(64, 64), (48, 64)]
GROWTH = 64e6  # bytes; the first batches of 16 callers bring more activations than the warm-up saw


@pytest.fixture(scope="module")
def made():
    return bench.cases(load("demo", device="cpu"), SIZES)


def test_sustained_load(made):
    """A server process under 1, 4 and 16 concurrent callers."""
    with bench.served("demo", "--device", "cpu") as url:
        turns, memory = bench.measure(url, made, [1, 4, 16], requests=32, seconds=120)
    for turn in turns:
        assert turn.clean, turn
        assert turn.sent == 32 and 0 < turn.latency["p50"] <= turn.latency["p100"] < turn.seconds
    assert max(memory.values()) - memory["warm-up"] < GROWTH


def test_one_image_at_a_time_is_exact(made):
    with served(load("demo", device="cpu"), limits=Limits(max_batch=1)) as client:
        turn = bench.run_turn(str(client.base_url), made, concurrency=6, requests=24, seconds=120)
    assert turn.exact == turn.sent == 24


def test_what_is_lost_or_mixed_up_shows(made):
    """The checker itself: a server that swaps prompts, refuses, or is gone."""
    cases = [bench.Case({"prompt": p, "seed": 5, "size": "32x32"}, pixels(p)) for p in ("a", "bbbbbbbbbbbb")]
    swapped = [bench.Case(cases[0].body, cases[1].image), bench.Case(cases[1].body, cases[0].image)]
    with served(FakePipe()) as client:
        url = str(client.base_url)
        assert bench.run_turn(url, cases, 2, 8, 60).exact == 8
        turn = bench.run_turn(url, swapped, 2, 8, 60)
        assert turn.wrong == 8 and not turn.clean and "levels from its own" in turn.problems[0]
        client.engine.close()
        turn = bench.run_turn(url, cases, 2, 8, 60)
        assert turn.failed == 8 and " 503 " in turn.problems[0]
    assert bench.run_turn(url, cases, 2, 8, 60).failed == 8


def pixels(prompt: str) -> np.ndarray:
    return np.asarray(FakePipe.image(prompt, 5, 32, 32))


@pytest.mark.full
def test_long_load(tmp_path):
    """The documented command."""
    file = tmp_path / "load.json"
    options = ["--device", "cpu", "--requests", "1000", "--json", str(file)]
    assert bench.main(["demo", *options, "--", "--max-batch", "4"]) == 0
    report = json.loads(file.read_text())
    assert report["passed"] and [turn["sent"] for turn in report["turns"]] == [1000] * 4
