"""What `python -m benches.peers` says of its goals."""

from __future__ import annotations

from typing import Any

import pytest

from benches.peers.goals import judge


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
    assert [(v.case, v.met) for v in found if v.goal.startswith("image,")] == [("demo", False)]
    assert {v.goal for v in found if v.case == "vae"} == {
        "float32, speed over OpenVINO", "peak memory over the least of the peers'"
    }  # fmt: skip
    assert all(str(v) and v.to_dict()["met"] is v.met for v in found)
