"""What a record says of the goals: each met, missed, or without a contender that it needs."""

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


def judge(record: Mapping[str, Any]) -> list[Verdict]:
    """Every goal in every case that it is about, in the record's order; ratios of medians of one run."""
    verdicts = [verdict for name, case in record["cases"].items() for verdict in _of_case(name, case["peers"])]
    ratio = record["import_seconds"]["ratio"]
    return [*verdicts, Verdict("import twinflow_rt over import torch", "import", ratio, 1.5, least=False)]


def _of_case(name: str, peers: Peers) -> Iterator[Verdict]:
    def total(peer: str) -> float | None:
        return peers.get(peer, {}).get("total", {}).get("median")

    def over(theirs: float | None, ours: str) -> float | None:
        mine = total(ours)
        return None if theirs is None or mine is None else theirs / mine

    def best(names: tuple[str, ...], figure: Callable[[str], float | None]) -> float | None:
        return min((found for each in names if (found := figure(each)) is not None), default=None)

    def memory(peer: str) -> float | None:
        return peers.get(peer, {}).get("peak_rss_bytes") if total(peer) is not None else None

    case = CASES[name]
    if case.part == "image":
        yield Verdict("float32, speed over diffusers' faster", name, over(best(DIFFUSERS, total), "ours"), 1.3)
    yield Verdict("float32, speed over OpenVINO", name, over(total("openvino"), "ours"), 1.0)
    if case.part == "image" and case.model is not None:
        yield Verdict("int8, speed over diffusers eager", name, over(total("diffusers"), "ours-int8"), 2.0)
    if case.model is None:
        yield Verdict("image, speed over diffusers eager", name, over(total("diffusers"), "ours"), 3.0)
    least, mine = best((*DIFFUSERS, "openvino"), memory), memory("ours")
    share = None if least is None or mine is None else mine / least
    yield Verdict("peak memory over the least of the peers'", name, share, 1.0, least=False)
    if case.part == "image":
        rate = peers.get("ours", {}).get("network", {}).get("share_of_float32_gemm")
        yield Verdict("transformer, share of the matrix product rate", name, rate, 0.8)
