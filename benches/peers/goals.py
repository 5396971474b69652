"""What a record says of the goals: each met, missed, or without a contender that it needs.

They are about calls in a row. Those of the demo, whose calls are short, are asked once more of calls after a pause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .cases import CASES

Peers = Mapping[str, Mapping[str, Any]]
DIFFUSERS = ("diffusers", "diffusers-compile")


@dataclass(frozen=True)
class Verdict:
    """value: None where a contender is missing. met: value >= bound (`least`) or value <= bound."""

    goal: str
    case: str
    value: float | None
    bound: float
    least: bool = True

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.least else self.value <= self.bound

    def __str__(self) -> str:
        found = "not judged" if self.value is None else f"{self.value:.2f}"
        word = {True: "met", False: "MISSED", None: "missing contender"}[self.met]
        return f"  {word:<8} {self.case:<12} {self.goal}: {found} (goal {'>=' if self.least else '<='} {self.bound:g})"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def after_pause(figure: Mapping[str, Any]) -> Any:
    """The samples of a figure's calls after a pause: its own where they were not told apart, being long."""
    return figure.get("after_pause", figure)


def judge(record: Mapping[str, Any]) -> list[Verdict]:
    """Every goal in every case that it is about, in the record's order; ratios of medians of one run."""
    verdicts = [verdict for name, case in record["cases"].items() for verdict in _of_case(name, case["peers"])]
    ratio = record["import_seconds"]["ratio"]
    return [*verdicts, Verdict("import twinflow_rt over import torch", "import", ratio, 1.5, least=False)]


def _of_case(name: str, peers: Peers) -> Iterator[Verdict]:
    yield from _of_speed(name, peers)
    memory = lambda found: found["peak_rss_bytes"]
    least, mine = _best(peers, (*DIFFUSERS, "openvino"), memory), _best(peers, ("ours",), memory)
    share = None if least is None or mine is None else mine / least
    yield Verdict("peak memory over the least of the peers'", name, share, 1.0, least=False)
    if CASES[name].model is None:
        figures = ("total", "network")
        first = {peer: {f: after_pause(found[f]) for f in figures if f in found} for peer, found in peers.items()}
        yield from _of_speed(name, first, ", after a pause")


def _of_speed(name: str, peers: Peers, when: str = "") -> Iterator[Verdict]:
    def over(theirs: tuple[str, ...], ours: str) -> float | None:
        total = lambda found: found["total"]["median"]
        fastest, mine = _best(peers, theirs, total), _best(peers, (ours,), total)
        return None if fastest is None or mine is None else fastest / mine

    case = CASES[name]
    if case.part == "image":
        yield Verdict(f"float32, speed over diffusers' faster{when}", name, over(DIFFUSERS, "ours"), 1.3)
    yield Verdict(f"float32, speed over OpenVINO{when}", name, over(("openvino",), "ours"), 1.0)
    if case.part == "image" and case.model is not None:
        yield Verdict(f"int8, speed over diffusers eager{when}", name, over(("diffusers",), "ours-int8"), 2.0)
    if case.model is None:
        yield Verdict(f"image, speed over diffusers eager{when}", name, over(("diffusers",), "ours"), 3.0)
    if case.part == "image":
        rate = peers.get("ours", {}).get("network", {}).get("share_of_float32_gemm")
        yield Verdict(f"transformer, share of the matrix product rate{when}", name, rate, 0.8)


def _best(peers: Peers, names: tuple[str, ...], figure: Callable[[Mapping[str, Any]], float]) -> float | None:
    """The least of a figure among those of `names` that were timed, or None."""
    return min((figure(peers[each]) for each in names if "total" in peers.get(each, {})), default=None)
