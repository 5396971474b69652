"""What fits which card: chosen from counted costs, for published models that are not here and for folders."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.planning.test_memory_plan import costs
from twinflow_rt.planning import cards

KEYS = ("precision", "text encoder", "network", "decoding")


def scaled(factor):
    """Costs of small numbers as those of a model of gigabytes."""
    small = costs()
    times = lambda value: tuple(map(times, value)) if isinstance(value, tuple) else round(factor * value)
    weights = {name: type(w)(*map(times, vars(w).values())) for name, w in small.weights.items()}
    works = {name: times(getattr(small, name)) for name in ("text", "context", "velocity")}
    return replace(small, weights=weights, decode=lambda tile: times(small.decode(tile)), **works)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (30e6, ["int4 streams stays 128", "int4 stays stays 256", "bf16 streams stays 192", "bf16 stays stays 384"]),
        (64e6, ["does not fit", "does not fit", "int4 streams 3 of 4 blocks stream 192", "int4 stays stays 256"]),
    ],
)
def test_the_most_exact_precision_whose_network_stays(factor, expected):
    """Where even the smallest does not, as few of its blocks stream as have to."""
    sizes = {"bf16": scaled(factor), "int8": scaled(0.75 * factor), "int4": scaled(0.5 * factor)}
    rows = cards.fits("m", sizes, (768, 1024, 1))
    said = [" ".join(str(row[k]) for k in KEYS if k in row).replace("tiles of ", "") for row in rows]
    assert said[: len(expected)] == expected and {row["image"] for row in rows} == {"1024x768"}
    for row in rows:
        assert row.get("predicted peak", 0) <= cards.usable(int(row["card"].split()[0]))
        assert (row.get("on the host", 0) > 0) is ("stream" in str(row.get("network")) + str(row.get("text encoder")))
    lines = cards.table(rows).splitlines()
    assert len(lines) == 2 + len(cards.CARDS) and len({line.count("|") for line in lines}) == 1
