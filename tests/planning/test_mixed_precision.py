"""What keeps a network within a memory budget: mixes of 4 and more bits by what was measured, then through `load`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch

from tests.factory import make_model
from twinflow_rt import load
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.errors import ConfigError
from twinflow_rt.passes.layer_groups import Group
from twinflow_rt.planning import precision, sensitivity
from twinflow_rt.planning.mixed_precision import fit, mix
from twinflow_rt.planning.precision import Arithmetic, Measurement

CPU = torch.device("cpu")
INT4 = (Group("qkv", 2, 3000, 0.08), Group("w13", 2, 8000, 0.05), Group("w2", 2, 4000, 0.01))
INT8 = tuple(replace(group, error=group.error / 10) for group in INT4)
MADE_UP = Measurement(
    precision="int4", family="z-image", weights="w", device="a chip", torch="2", dtype="float32", budget=0.1,
    skip_layers=("qkv:int8",), error=0.05, seconds=1.0, seconds_before=1.0, groups=INT4,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("mixed") / "model")


def spent(entries):
    """The bytes beyond 4 bits that a mix takes, and its error, counted anew; bfloat16 is the dtype."""
    given = dict(entry.partition(":")[::2] for entry in entries)
    sizes = {"int8": 1.0, "": 2.0}
    room = sum(g.parameters * (sizes[given[g.name]] - 4.25 / 8) for g in INT4 if g.name in given)
    left = {"int8": 0.1, "": 0.0, "int4": 1.0}
    return room, sum((g.error * left[given.get(g.name, "int4")]) ** 2 for g in INT4) ** 0.5


@pytest.mark.parametrize("room", [0, 1400, 3000, 5500, 7200, 12000, 1e9])
def test_room_goes_where_it_lowers_the_error_most(room):
    entries, error = mix(INT4, INT8, room, itemsize=2)
    took, expected = spent(entries)
    assert took <= room * (1 + 1e-4) and error == pytest.approx(expected, abs=1e-9)
    every = [[f"{g.name}{kind}" for g, kind in zip(INT4, kinds, strict=True) if kind is not None]
             for kinds in product((None, ":int8", ""), repeat=3)]  # fmt: skip
    best = min(e for size, e in map(spent, every) if size <= room)
    assert error <= 1.7 * best + 1e-9  # greedy: a group that just does not fit is passed over
    assert {0: (), 1e9: {g.name for g in INT4}}.get(room, set(entries)) in (entries, set(entries))


def test_int8_of_unknown_error_counts_as_exact():
    assert mix(INT4, (), 1e9, 4) == (("qkv:int8", "w13:int8", "w2:int8"), pytest.approx(0, abs=1e-8))


@dataclass
class Held:
    """A memory plan of so many bytes of weights."""

    peak: int
    streamed: int


def held(budget, least=0):
    """A stub of `plan_memory`: 15,000 weights in bfloat16, less for those that have 8 or 4 bits."""

    def plan(some):
        size = {None: 30000, "int8": 15000, "int4": 8000 + int(spent(some.skip_layers)[0])}[some.precision]
        if budget < least:
            raise ConfigError("too small")
        return Held(min(size, budget), streamed=int(size > budget))

    return plan


@pytest.fixture
def fitted(folder):
    """fit() for a network of bfloat16 within a budget, once for the measurements of these precisions."""
    network = Checkpoint(folder / "transformer")

    def run(budget, *found, least=0):
        here = precision.kept_here([one.precision for one in found], network, CPU, torch.bfloat16)
        for one in found:
            precision.save(one, here[one.precision])
        chosen = Arithmetic(torch.bfloat16, notes=("auto chose bfloat16", "auto: more"))
        return fit(chosen, network, CPU, budget, held(budget, least))

    return run


@pytest.mark.parametrize(("budget", "kind"), [(40000, None), (16000, "int8"), (9000, "int4"), (5000, "int4")])
def test_no_more_layers_get_4_bits_than_the_budget_asks_for(fitted, budget, kind):
    got, memory = fitted(budget)
    assert got.precision == kind and bool(memory.streamed) == (budget < 8000) and not got.skip_layers
    assert got.notes[0].startswith("auto chose bfloat16" if kind is None else f"auto chose {kind}: memory_budget does")
    assert "more" in got.notes[1]
    assert (kind == "int4") == any("int4 was not measured here" in note for note in got.notes)


def test_what_was_measured_makes_the_mix(fitted):
    got, memory = fitted(9500, MADE_UP)
    assert got.precision == "int4" and got.skip_layers == ("qkv:int8",) and got.sensitivity == INT4
    assert memory.peak == 8000 + int(spent(["qkv:int8"])[0]) and "1 of 3 kinds" in got.notes[-1]


def test_what_measured_inaccurate_is_not_taken(fitted):
    strict = replace(MADE_UP, budget=0.04)
    got, memory = fitted(9500, strict)  # 4 bits would be within 0.051
    assert got.precision == "int8" and memory.streamed
    inexact = replace(MADE_UP, precision="int8", skip_layers=(), error=0.04, budget=0.03, groups=INT8)
    assert fitted(16000, strict, inexact)[0].precision == "int4"  # all but some layers of 8
    with pytest.raises(ConfigError, match="too small"):
        fitted(100, least=200)


def test_auto_loads_4_bits_where_a_budget_asks_for_them(folder):
    options = {"device": "cpu", "dtype": "float32"}
    whole = load(folder, precision="int8", memory_budget="1GB", **options).memory.peak
    least = load(folder, precision="int8", memory_budget=whole - 1, **options).memory  # its text encoder streams
    pipe = load(folder, precision="auto", memory_budget=least.peak - 1, **options)
    assert not least.streamed and pipe.plan.precision == "int4" and not pipe.memory.streamed
    assert pipe.memory.peak < least.peak and "chosen by auto" in pipe.plan.arithmetic


def test_sensitivity_of_4_bits_gives_sensitive_layers_8(folder):
    pipe = load(folder, device="cpu", dtype="float32")
    loose = sensitivity.of_pipeline(pipe, "int4", rounds=1)
    assert all(group.name.endswith("w2") and 0.02 < group.error < 0.2 for group in loose.groups)
    found = sensitivity.of_pipeline(pipe, "int4", budget=loose.groups[-1].error / 2, rounds=1)
    assert set(found.skip_layers) == {f"{group.name}:int8" for group in found.groups} and found.error < loose.error / 2
    precision.save(found)
    again = load(folder, device="cpu", dtype="float32", precision="int4", skip_layers=found.path)
    assert f"{found.groups[0]}  int8" in str(again.plan) and "int4" not in {group.kind for group in again.plan.layers}
