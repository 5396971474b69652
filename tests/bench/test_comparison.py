"""Statistics and verdicts: faster, slower or within noise, gates, refusals."""

from __future__ import annotations

import copy
import math
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


@pytest.mark.parametrize("seed", range(5))
def test_mann_whitney_by_its_definition(seed):
    """U counts the pairs where `a` is larger, ties by half; its variance is the ranks', which ties make smaller."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 1, 15).round(1), rng.normal(0.4 * seed, 1, 22).round(1)  # with ties
    u = sum((x > y) + (x == y) / 2 for x in a for y in b)
    ties = sum(n**3 - n for n in np.unique([*a, *b], return_counts=True)[1])
    variance = 15 * 22 / 12 * (38 - ties / (37 * 36))
    z = max(0, abs(u - 15 * 22 / 2) - 0.5) / math.sqrt(variance)
    assert mann_whitney(a, b) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-9)
    assert mann_whitney([1.0] * 5, [1.0] * 5) == 1.0


def test_one_sample_has_no_spread_and_no_scipy_is_told(monkeypatch):
    assert ratio_interval([3.0], [2.0]) == (1.5, 1.5)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match=r"needs scipy: pip install 'twinflow-rt\[report\]'"):
        ratio_interval([1.0, 2.0], [1.0, 2.0])


def test_interval_covers_the_ratio():
    """A 95% interval misses the truth in about 3 of 60 experiments; 10 would be a bug."""
    rng, missed = np.random.default_rng(1), 0
    for seed in range(60):
        low, high = ratio_interval(rng.normal(2, 0.1, 20), rng.normal(1, 0.05, 20), seed=seed)
        missed += not low <= 2 <= high
    assert missed < 10


def test_pairing_cancels_what_slows_a_whole_round():
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 3, 20)
    a, b = 2 * drift * rng.normal(1, 0.01, 20), drift * rng.normal(1, 0.01, 20)
    paired, apart = ratio_interval(a, b, paired=True), ratio_interval(a, b)
    assert paired[1] - paired[0] < 0.5 * (apart[1] - apart[0]) and paired[0] <= 2.05 and paired[1] >= 1.95
    with pytest.raises(ValueError, match="equally many"):
        ratio_interval([1.0], [1.0, 2.0], paired=True)


def verdicts(before, after, **options):
    return {d.figure: d for d in compare(before, after, **options).differences}


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
    ("factor", "verdict", "why"),
    [
        (1.10, "slower", "beyond 3%"),
        (0.90, "faster", "beyond 3%"),
        (1.02, "within noise", ""),
        (1.0, "within noise", "contains 1"),
    ],
)
def test_verdicts(steady, factor, verdict, why):
    d = verdicts(steady, changed(steady, total=samples(0.1 * factor, seed=1)))["stage total"]
    assert d.verdict == verdict and why in d.reason and not d.gated
    assert d.ratio == pytest.approx(factor, rel=0.02)


def test_clear_but_small_is_noise_between_runs(steady):
    d = verdicts(steady, changed(steady, total=samples(0.102, spread=0.001, seed=1)))["stage total"]
    assert d.verdict == "within noise" and "3%" in d.reason
    d = verdicts(steady, changed(steady, total=samples(0.102, spread=0.001, seed=1)), threshold=0.0)["stage total"]
    assert d.verdict == "slower" or "Mann" in d.reason


def test_few_samples_decide_nothing(steady):
    d = verdicts(steady, changed(steady, total=samples(0.2, count=4)))["stage total"]
    assert d.verdict == "within noise" and "only 4 samples" in d.reason


def test_a_machine_that_drifted_widens_the_band(steady):
    slower = changed(steady, total=samples(0.12, seed=1))
    assert verdicts(steady, slower)["stage total"].verdict == "slower"
    slower["ceilings"]["drift"] = 0.7
    result = compare(steady, slower)
    assert {d.figure: d.verdict for d in result.differences}["stage total"] == "within noise"
    assert any("30%" in w for w in result.warnings)


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


def test_gate_looks_at_ratios_only(steady):
    assert compare(steady, changed(steady, total=samples(0.9))).gate()  # nine times slower: not the gate's business
    worse = changed(steady)
    worse["peers"][0].update(speedup=1.2, interval=[1.15, 1.25])
    assert not compare(steady, worse).gate()
    assert compare(worse, steady).gate()
    overlapping = changed(steady)
    overlapping["peers"][0].update(speedup=1.44, interval=[1.38, 1.5])
    assert compare(steady, overlapping).gate()
    bare = changed(steady)
    bare["peers"] = []
    with pytest.raises(ConfigError, match="nothing to gate on"):
        compare(bare, bare).gate()


def test_a_speedup_lost_to_the_error_rule_fails_the_gate(steady):
    wrong = changed(steady)
    wrong["peers"][0].update(speedup=None, interval=None, reason="no speed-up is stated: ours: wrong")
    (regression,) = compare(steady, wrong).regressions
    assert regression.verdict == "worse" and "no speed-up" in regression.reason


def test_records_round_trip_and_damage_is_named(steady, tmp_path):
    path = records.save(steady, tmp_path / "r.json")
    assert records.load(path) == steady and [p.name for p in tmp_path.iterdir()] == ["r.json"]
    for damage, message in (
        (lambda r: r.update(schema=2), "record has schema 2"),
        (lambda r: r.pop("stages"), "lacks stages"),
        (lambda r: r["stages"]["total"].update(median="fast"), r"record.stages.total.median must be a number"),
        (lambda r: r["stages"]["total"].update(p99=-1.0), "p99 must be 0 or more"),
        (lambda r: r.update(extra=1), "fields that are not known: extra"),
        (lambda r: r["batches"][0].update(batch=True), "batch must be an integer"),
    ):
        broken = copy.deepcopy(steady)
        damage(broken)
        with pytest.raises(ConfigError, match=message):
            validate(broken)
        with pytest.raises(ConfigError, match=message):
            records.save(broken, tmp_path / "never.json")
    assert not (tmp_path / "never.json").exists()
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        records.load(tmp_path / "text.json")
    with pytest.raises(ConfigError, match="does not exist"):
        records.load(tmp_path / "absent.json")
