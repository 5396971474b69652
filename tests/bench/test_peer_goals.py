"""What `python -m benches.peers` makes of turns, and says of its goals."""

from __future__ import annotations

from typing import Any

import pytest

from benches.peers.__main__ import _derive, _samples
from benches.peers.goals import judge
from benches.peers.worker import turn


def figures(total: float, peak: float, share: float | None = None) -> dict[str, Any]:
    network = {} if share is None else {"network": {"share_of_float32_gemm": share}}
    return {"total": {"median": total}, "peak_rss_bytes": peak, **network}


def record(**cases: dict[str, Any]) -> dict[str, Any]:
    return {"import_seconds": {"ratio": 0.1}, "cases": {name: {"peers": peers} for name, peers in cases.items()}}


def verdicts(**peers: dict[str, Any]) -> dict[str, tuple[float | None, bool | None]]:
    return {verdict.goal: (verdict.value, verdict.met) for verdict in judge(record(medium=peers))}


OURS = {"ours": figures(1.0, 100, 0.85), "ours-int8": figures(0.6, 90, 1.5)}


def test_ratios_and_verdicts_of_one_case():
    found = verdicts(
        **OURS, diffusers=figures(1.5, 120), openvino=figures(0.9, 99), **{"diffusers-compile": figures(1.4, 130)}
    )
    assert found["float32, speed over diffusers' faster"] == (pytest.approx(1.4), True)
    assert found["float32, speed over OpenVINO"] == (pytest.approx(0.9), False)
    assert found["int8, speed over diffusers eager"] == (pytest.approx(2.5), True)
    assert found["peak memory over the least of the peers'"] == (pytest.approx(100 / 99), False)
    assert found["transformer, share of the matrix product rate"] == (0.85, True)
    assert found["import twinflow_rt over import torch"] == (0.1, True)


def test_a_missing_contender_is_no_victory():
    absent = {"absent": "does not convert"}
    found = verdicts(**OURS, diffusers=figures(1.5, 120), openvino=absent)
    assert found["float32, speed over OpenVINO"] == (None, None)
    assert found["peak memory over the least of the peers'"] == (pytest.approx(100 / 120), True)
    off = {"absent": "output is off", "relative_rms_error": 1.0}
    assert verdicts(ours=off, diffusers=figures(1.5, 120))["float32, speed over diffusers' faster"] == (None, None)


def test_goals_of_the_demo_and_of_a_decoder():
    peers = {"ours": figures(1.0, 100, 0.5), "diffusers": figures(2.9, 120), "openvino": figures(1.0, 110)}
    found = judge(record(demo=peers, vae=peers))
    assert [(v.case, v.met) for v in found if v.goal.startswith("image,")] == [("demo", False)] * 2
    assert {v.goal for v in found if v.case == "vae"} == {
        "float32, speed over OpenVINO", "peak memory over the least of the peers'"
    }  # fmt: skip
    assert all(str(v) and v.to_dict()["met"] is v.met for v in found)


def test_the_demos_goals_are_judged_after_a_pause_as_well():
    def paused(total: float, first: float | None, share: float) -> dict[str, Any]:
        found = figures(total, 100, share)
        if first is not None:
            found["total"]["after_pause"] = {"median": first}
            found["network"]["after_pause"] = {"share_of_float32_gemm": share / 2}
        return found

    peers = {"ours": paused(1.0, 4.0, 0.9), "diffusers": paused(3.5, None, 0.5), "openvino": paused(2.0, 2.0, 0.5)}
    found = {(v.case, v.goal): (v.value, v.met) for v in judge(record(demo=peers, medium=peers))}
    when = ", after a pause"
    assert found["demo", "float32, speed over OpenVINO"] == (2.0, True)
    assert found["demo", "float32, speed over OpenVINO" + when] == (0.5, False)
    assert found["demo", "image, speed over diffusers eager" + when] == (3.5 / 4, False)  # a long call: the same
    assert found["demo", "transformer, share of the matrix product rate" + when] == (0.45, False)
    assert not any(case == "medium" and when in goal for case, goal in found)
    assert sum("memory" in goal for case, goal in found if case == "demo") == 1


def test_a_turn_is_two_calls_or_a_long_one():
    calls: list[int] = []
    times = iter([0.0, 0.2, 1.0, 1.1, 2.0, 2.3])
    clock = lambda: next(times)
    assert turn(calls.append, 3, clock) == {"seconds": pytest.approx(0.1), "after_pause": pytest.approx(0.2)}
    assert turn(calls.append, 4, clock) == {"seconds": pytest.approx(0.3)}
    assert calls == [6, 7, 8]


def test_figures_of_turns():
    short = [{"seconds": s, "after_pause": 2 * s} for s in (1.0, 2.0, 3.0)]
    result = {"ours": {"total": _samples(short)}, "diffusers": {"total": _samples([{"seconds": 8.0}] * 3)}}
    long = {"ours": {"total": _samples([*short, {"seconds": 9.0}])}}
    _derive(result, {"total": 6}, 2.0)
    _derive(long, {}, 2.0)
    mine, theirs = result["ours"]["total"], result["diffusers"]["total"]
    assert (mine["median"], mine["share_of_float32_gemm"]) == (2.0, 1.5)
    assert (mine["after_pause"]["median"], mine["after_pause"]["share_of_float32_gemm"]) == (4.0, 0.75)
    assert mine["ours_is_faster_by"] == mine["after_pause"]["ours_is_faster_by"] == 1
    assert theirs["ours_is_faster_by"] == 4 and "after_pause" not in theirs
    assert "after_pause" not in long["ours"]["total"]
