"""Timing: rounds in turns, warm-up, summaries, memory and machine facts."""

from __future__ import annotations

import getpass
import json
import mmap
import platform
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from twinflow_rt.bench import ceilings, facts
from twinflow_rt.bench.memory import reset_host_peak, stage_peaks
from twinflow_rt.bench.timing import Samples, interleave
from twinflow_rt.errors import ConfigError
from twinflow_rt.runtime.timer import Timer

CPU = torch.device("cpu")


def test_callables_take_turns_in_changing_order():
    log: list[str] = []
    calls = {name: lambda name=name: log.append(name) for name in "abcd"}
    taken = interleave(calls, repeats=12, warmup=2)
    assert {name: len(s.seconds) for name, s in taken.items()} == dict.fromkeys("abcd", 12)
    rounds = [log[i : i + 4] for i in range(0, len(log), 4)]
    assert len(rounds) == 14 and all(sorted(r) == [*"abcd"] for r in rounds)
    assert len({tuple(r) for r in rounds[2:]}) > 3
    again: list[str] = []
    interleave({name: lambda name=name: again.append(name) for name in "abcd"}, repeats=12, warmup=2)
    assert again == log  # the order is the seed's


def test_time_limit_keeps_three_rounds():
    taken = interleave({"a": lambda: time.sleep(0.002)}, repeats=50, warmup=0, max_seconds=0.0)
    assert len(taken["a"].seconds) == 3 and min(taken["a"].seconds) >= 0.002


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}, {"clock": "sun"}])
def test_impossible_options(options):
    with pytest.raises(ConfigError):
        interleave({"a": lambda: None}, **options)


def test_summaries_are_numpys():
    values = np.random.default_rng(0).exponential(size=37)
    summary = Samples(tuple(values)).to_dict()
    quartiles = np.quantile(values, [0.25, 0.75])
    expected = {
        "median": np.median(values), "p50": np.median(values), "p90": np.quantile(values, 0.9),
        "p99": np.quantile(values, 0.99), "min": values.min(), "iqr": quartiles[1] - quartiles[0],
        "mad": np.median(np.abs(values - np.median(values))), "samples": list(values),
    }  # fmt: skip
    assert {name: pytest.approx(value) for name, value in expected.items()} == summary
    with pytest.raises(ConfigError, match="at least one sample"):
        Samples(())


@pytest.mark.gpu
@pytest.mark.parametrize("clock", ["wall", "device"])
def test_launches_do_not_pass_for_time(clock):
    """8192^3 in float32 takes milliseconds on any GPU; its launch takes microseconds."""
    a = torch.randn(8192, 8192, device="cuda")
    timer = Timer("cuda", clock, flush_l2=True)
    timer(lambda: a @ a)
    assert timer(lambda: a @ a) > 1e-3


def test_peak_of_a_stage_is_its_own():
    """An early high peak must not hide a later, lower one."""
    if not reset_host_peak():
        pytest.skip("this system cannot reset a process's peak of resident memory")

    def touch(size):
        with mmap.mmap(-1, size) as block:  # given back at once, which malloc may not do
            block.write(b"x" * size)

    big, small = (stage_peaks(lambda size=size: touch(size), CPU) for size in (200_000_000, 1_000_000))
    assert big["device_allocated"] is None and big["host_peak_is_of_stage"]
    assert big["host_resident"] - small["host_resident"] > 150e6


def test_ceilings_are_of_this_machine():
    """A product of the size measured cannot beat the ceiling by much, nor fall far short of it."""
    found = ceilings.measure(CPU, ["float32"], repeats=3)
    n = found.sizes["float32"]
    seconds = min(interleave({"": lambda: torch.randn(n, 64) @ torch.randn(64, n)}, repeats=3)[""].seconds)
    assert 2 * n * n * 64 / seconds < 4 * found.gemm["float32"]
    assert found.gemm["float32"] > 1e9 and found.copy > 1e8
    assert found.seconds(found.gemm["float32"], 0, "float32") == pytest.approx(1)
    assert found.seconds(1, 2 * found.copy, "float32") == pytest.approx(2)
    with pytest.raises(ConfigError, match="int8"):
        ceilings.measure(CPU, ["int8"])
    with pytest.raises(ConfigError, match=r"8\.9"):
        ceilings.measure(CPU, ["float8"])


def test_facts_name_the_machine_and_nobody():
    record = facts.machine("cpu")
    text = json.dumps(record)
    assert record["cores"] >= 1 and record["memory_bytes"] > 1e8 and record["gpu"] is None
    assert record["packages"]["torch"] == torch.__version__
    for private in (platform.node(), getpass.getuser(), str(Path.home()), str(Path(facts.__file__).parents[2])):
        assert private not in text
    assert facts.same_machine(record, record) == []


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"cpu_clock_mhz": 1.0}, []),
        ({"cores": 4, "gpu": {"name": "H100"}}, ["cores: 2 against 4", "gpu: None against H100"]),
        ({"threads": 1}, ["threads: 2 against 1"]),
    ],
)
def test_machines_differ_by_hardware_only(change, differing):
    machine = {"cpu": "x", "cores": 2, "threads": 2, "gpu": None}
    assert facts.same_machine(machine, {**machine, **change}) == differing


def test_nvidia_smi_by_uuid():
    answer = (
        "GPU-aaa, 570.1, 700.00, 1980, 345, 2619, 30\n"
        "GPU-bbb, 570.1, [N/A], 1980, 1755, 2619, 41\n"
    )  # fmt: skip
    assert facts.parse_smi(answer, "bbb") == {
        "driver": "570.1", "power_limit_w": None, "max_sm_clock_mhz": 1980.0, "sm_clock_mhz": 1755.0,
        "memory_clock_mhz": 2619.0, "temperature_c": 41.0,
    }  # fmt: skip
    assert facts.parse_smi(answer, "GPU-aaa")["power_limit_w"] == 700
    assert set(facts.parse_smi("No devices were found", "x").values()) == {None}
