"""Two records, figure by figure: faster, slower or within noise, and why.

A difference counts when three things agree: the 95% bootstrap interval of the ratio of medians leaves
out 1, the Mann-Whitney test rejects equality (p < 0.01), and the ratio leaves the band that samples of
one run cannot see: `threshold` for what changes from run to run, or the drift of the machine's own
ceilings during or between the two runs where that is more.

The gate looks at what survives a change of load, the speed-ups over peers of the same run; never at seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from . import stats
from .facts import same_machine
from .record import Record, timings

THRESHOLD, LEVEL, FEWEST = 0.03, 0.01, 5


@dataclass(frozen=True)
class Difference:
    """One figure of two records. before, after: medians in seconds, or speed-ups. ratio: after / before. verdict: for
    times "faster", "slower" or "within noise"; for ratios "better", "worse", ditto.
    gated: a regression here fails the gate."""

    figure: str
    before: float | None
    after: float | None
    ratio: float | None
    verdict: str
    reason: str
    gated: bool = False

    @property
    def regressed(self) -> bool:
        return self.gated and self.verdict in ("slower", "worse")


@dataclass(frozen=True)
class Comparison:
    """differences: of figures that both records have. warnings: what makes them less certain."""

    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if d.regressed)

    def gate(self) -> bool:
        """Return whether no gated figure got worse. Raises ConfigError where there is none to look at."""
        if not any(d.gated for d in self.differences):
            raise ConfigError(
                "nothing to gate on: the records have no common peer's speed-up; measure both with --peers eager"
            )
        return not self.regressions

    def __str__(self) -> str:
        lines = [f"{d.figure:<20} {d.verdict:<12} {d.reason}" for d in self.differences]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


def compare(
    before: Record, after: Record, *, any_machine: bool = False, threshold: float = THRESHOLD
) -> Comparison:  # fmt: skip
    """Compare two records. threshold: the relative change that runs of the same program differ by.

    Raises ConfigError for records of different workloads, or of different machines unless `any_machine`.
    """
    if differing := _settings(before["settings"], after["settings"]):
        raise ConfigError(f"the records measured different things: {'; '.join(differing)}")
    elsewhere = same_machine(before["machine"], after["machine"])
    if elsewhere and not any_machine:
        raise ConfigError(
            f"the records are of different machines: {'; '.join(elsewhere)}; --any-machine compares them anyway"
        )
    drift = _drift(before, after)
    warnings = [f"different machines: {'; '.join(elsewhere)}"] if elsewhere else []
    if drift > threshold:
        warnings.append(f"the machine's matrix products differed by {drift:.0%}: differences below that are noise")
    warnings += [f"{name}: {note}" for name, record in (("A", before), ("B", after)) for note in record["notes"]]
    band, theirs = max(threshold, drift), dict(timings(after))
    differences = [_times(name, a, theirs[name], band) for name, a in timings(before) if name in theirs]
    differences += _ratios(before, after, threshold)
    return Comparison(tuple(differences), tuple(warnings))


def _settings(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return what differs between two workloads; backend, repeats and tolerance may: they are what is compared."""
    keys = ("model", "random_weights", "scale", "layers", "width", "height", "batch", "nfe", "prompts")
    return [f"{key}: {a[key]} against {b[key]}" for key in keys if a[key] != b[key]]


def _drift(before: Record, after: Record) -> float:
    """Return the largest change of the machine's matrix products: within each run, and between them."""
    a, b = before["ceilings"], after["ceilings"]
    ratios = [a["drift"], b["drift"], *(b["gemm"][k] / a["gemm"][k] for k in a["gemm"] if k in b["gemm"])]
    return max(abs(float(r) - 1) for r in ratios)


def _times(figure: str, a: dict[str, Any], b: dict[str, Any], band: float) -> Difference:
    ratio = b["median"] / a["median"]
    few = min(len(a["samples"]), len(b["samples"]))
    if few < FEWEST:
        return Difference(figure, a["median"], b["median"], ratio, "within noise", f"only {few} samples: cannot tell")
    low, high = stats.ratio_interval(b["samples"], a["samples"])
    p = stats.mann_whitney(a["samples"], b["samples"])
    seen = f"x{ratio:.3f} in time, 95% [{low:.3f}, {high:.3f}], p = {p:.1g}"
    if low <= 1 <= high:
        verdict, why = "within noise", "the interval contains 1"
    elif p >= LEVEL:
        verdict, why = "within noise", f"Mann-Whitney does not tell them apart at {LEVEL}"
    elif abs(ratio - 1) <= band:
        verdict, why = "within noise", f"less than the {band:.0%} that runs differ by"
    else:
        verdict, why = ("slower" if ratio > 1 else "faster"), f"beyond {band:.0%}, interval and test agree"
    return Difference(figure, a["median"], b["median"], ratio, verdict, f"{seen}: {why}")


def _ratios(before: Record, after: Record, threshold: float) -> list[Difference]:
    """Compare speed-ups over the same peer; losing one to the correctness check is a regression."""
    theirs, out = {peer["name"]: peer for peer in after["peers"]}, []
    for a in before["peers"]:
        b, figure = theirs.get(a["name"]), f"speed-up over {a['name']}"
        if b is None or a["speedup"] is None:
            continue
        if b["speedup"] is None:
            out.append(Difference(figure, a["speedup"], None, None, "worse", b["reason"], gated=True))
            continue
        ratio, (a_low, a_high), (b_low, b_high) = b["speedup"] / a["speedup"], a["interval"], b["interval"]
        seen = f"{a['speedup']:.2f} [{a_low:.2f}, {a_high:.2f}] to {b['speedup']:.2f} [{b_low:.2f}, {b_high:.2f}]"
        if b_low <= a_high and a_low <= b_high:
            verdict, why = "within noise", "the intervals overlap"
        elif abs(ratio - 1) <= threshold:
            verdict, why = "within noise", f"less than the {threshold:.0%} that runs differ by"
        else:
            verdict, why = ("better" if ratio > 1 else "worse"), "the intervals are apart"
        out.append(Difference(figure, a["speedup"], b["speedup"], ratio, verdict, f"{seen}: {why}", gated=True))
    return out
