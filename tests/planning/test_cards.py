"""What fits which card: chosen from counted costs, for published models that are not here and for folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.planning.test_memory_plan import costs
from twinflow_rt.bench.random_weights import temporary
from twinflow_rt.planning import cards
from twinflow_rt.planning.memory_plan import choose

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


@pytest.mark.parametrize(("name", "side", "most"), [("z-image", 1024, 4.5e9), ("qwen-image", 1328, 9e9)])
def test_published_models_in_4_bits_fit(name, side, most):
    """The goals: with the text encoder out of the way the network stays; and docs/cards.md says what is counted."""
    with temporary(name) as folder:
        costs, largest = cards.count(folder, (side, side))
    plan = choose(costs["int4"], int(most), largest)
    assert not plan.streamed and plan.text_streams
    whole = costs["bf16"].weights["network"].held(0, 2)
    assert 0.25 * whole < plan.weights["network"] < 0.29 * whole
    if side == cards.SIDE:
        rows = cards.table(cards.fits(name, costs, largest)).splitlines()
        assert "\n".join(rows[2:]) in (Path(__file__).parents[2] / "docs" / "cards.md").read_text()
