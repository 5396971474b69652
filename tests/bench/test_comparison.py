"""Statistics and verdicts: faster, slower or within noise, gates, refusals."""

from __future__ import annotations

import copy
import re
import sys

import numpy as np
import pytest

from twinflow_rt.bench import record as records
from twinflow_rt.bench.comparison import compare
from twinflow_rt.bench.schema import validate
from twinflow_rt.bench.stats import mann_whitney, ratio_interval
from twinflow_rt.errors import ConfigError


def samples(center, spread=0.02, count=20, seed=0):
    from twinflow_rt.bench.timing import Samples

    return Samples(tuple(center * (1 + spread * np.random.default_rng(seed).standard_normal(count)))).to_dict()


def test_one_sample_has_no_spread_and_no_scipy_is_told(monkeypatch):
    assert ratio_interval([3.0], [2.0]) == (1.5, 1.5) and mann_whitney([1.0] * 5, [1.0] * 5) == 1.0
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match=r"needs scipy: pip install '\.\[report\]'"):
        ratio_interval([1.0, 2.0], [1.0, 2.0])


def test_pairing_cancels_what_slows_a_whole_round():
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 3, 20)
    a, b = 2 * drift * rng.normal(1, 0.01, 20), drift * rng.normal(1, 0.01, 20)
    paired, apart = ratio_interval(a, b, paired=True), ratio_interval(a, b)
    assert paired[1] - paired[0] < 0.5 * (apart[1] - apart[0]) and paired[0] <= 2.05 and paired[1] >= 1.95
    with pytest.raises(ValueError, match="equally many"):
        ratio_interval([1.0], [1.0, 2.0], paired=True)


def changed(record, **stages):
    out = copy.deepcopy(record)
    out["notes"] = []
    for name, value in stages.items():
        out["stages"][name] = value
    return out


@pytest.fixture
def steady(record):
    """A record of a quiet machine, its totals known."""
    out = changed(record, total=samples(0.1))
    out["ceilings"]["drift"] = 1.0
    for peer in out["peers"]:
        peer.update(speedup=1.5, interval=[1.45, 1.55], reason="both outputs passed")
    validate(out)
    return out


@pytest.mark.parametrize(
    ("after", "threshold", "verdict", "why"),
    [
        ({"center": 0.11}, 0.03, "slower", "beyond 3%"),
        ({"center": 0.09}, 0.03, "faster", "beyond 3%"),
        ({"center": 0.102}, 0.03, "within noise", ""),
        ({"center": 0.1}, 0.03, "within noise", "contains 1"),
        ({"center": 0.102, "spread": 0.001}, 0.03, "within noise", "3%"),  # clear, but runs differ by as much
        ({"center": 0.102, "spread": 0.001}, 0.0, "slower|within noise", "beyond 0%|Mann"),
        ({"center": 0.2, "count": 4}, 0.03, "within noise", "only 4 samples"),
    ],
)
def test_verdicts(steady, after, threshold, verdict, why):
    found = compare(steady, changed(steady, total=samples(**after, seed=1)), threshold=threshold)
    (d,) = (d for d in found.differences if d.figure == "stage total")
    assert re.fullmatch(verdict, d.verdict) and re.search(why, d.reason) and not d.gated
    assert d.ratio == pytest.approx(after["center"] / 0.1, rel=0.02)


def test_a_machine_that_drifted_widens_the_band(steady):
    slower = changed(steady, total=samples(0.12, seed=1))
    for drift, verdict, warned in ((1.0, "slower", False), (0.7, "within noise", True)):
        slower["ceilings"]["drift"] = drift
        result = compare(steady, slower)
        assert {d.figure: d.verdict for d in result.differences}["stage total"] == verdict
        assert any("30%" in w for w in result.warnings) == warned


def test_other_machines_and_other_work_are_refused(steady):
    other = copy.deepcopy(steady)
    other["machine"]["cpu"] = "another"
    with pytest.raises(ConfigError, match="different machines: cpu"):
        compare(steady, other)
    result = compare(steady, other, any_machine=True)
    assert any("different machines" in w for w in result.warnings)
    work = copy.deepcopy(steady)
    work["settings"]["width"] *= 2
    with pytest.raises(ConfigError, match="different things: width"):
        compare(steady, work)


@pytest.mark.parametrize(
    ("peer", "passes"),
    [
        ({}, True),
        ({"speedup": 1.2, "interval": [1.15, 1.25]}, False),
        ({"speedup": 1.9, "interval": [1.85, 1.95]}, True),
        ({"speedup": 1.44, "interval": [1.38, 1.5]}, True),  # the intervals overlap
        ({"speedup": None, "interval": None, "reason": "no speed-up is stated: ours: wrong"}, False),
    ],
)
def test_gate_looks_at_speedups_only(steady, peer, passes):
    after = changed(steady, total=samples(0.9))  # nine times slower: not the gate's business
    after["peers"][0].update(peer)
    result = compare(steady, after)
    assert result.gate() == passes
    assert [(d.verdict, "no speed-up" in d.reason) for d in result.regressions] == (
        [] if passes else [("worse", peer["speedup"] is None)]
    )
    after["peers"] = []
    with pytest.raises(ConfigError, match="nothing to gate on"):
        compare(steady, after).gate()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.update(schema=2), "record has schema 2"),
        (lambda r: r.pop("stages"), "lacks stages"),
        (lambda r: r["stages"]["total"].update(median="fast"), r"record.stages.total.median must be a number"),
        (lambda r: r["stages"]["total"].update(p99=-1.0), "p99 must be 0 or more"),
        (lambda r: r.update(extra=1), "fields that are not known: extra"),
        (lambda r: r["batches"][0].update(batch=True), "batch must be an integer"),
    ],
)
def test_damage_is_named(steady, tmp_path, damage, message):
    damage(steady)
    for refused in (validate, lambda record: records.save(record, tmp_path / "never.json")):
        with pytest.raises(ConfigError, match=message):
            refused(steady)
    assert not [*tmp_path.iterdir()]


def test_records_round_trip(steady, tmp_path):
    path = records.save(steady, tmp_path / "r.json")
    assert records.load(path) == steady and [p.name for p in tmp_path.iterdir()] == ["r.json"]
    (tmp_path / "text.json").write_text("{")
    for name, message in (("text.json", "is not JSON"), ("absent.json", "does not exist")):
        with pytest.raises(ConfigError, match=message):
            records.load(tmp_path / name)
