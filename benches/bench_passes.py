"""The compile path, pass by pass: what a start of the program pays once.

    make bench        (or: pytest benches/bench_passes.py --benchmark-only -o python_files='bench_*.py')
"""

from __future__ import annotations

import pytest
import torch

from twinflow_rt import load
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.layout import check
from twinflow_rt.checkpoint.reading import materialize
from twinflow_rt.compile import Recipe, compile_network
from twinflow_rt.families import family_of
from twinflow_rt.ops import Target, select
from twinflow_rt.passes.fold import fold
from twinflow_rt.sampling.schedule import preset, schedule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(pipe):
    """Checkpoint, family, and the unfolded network on the meta device."""
    checkpoint = Checkpoint(pipe.folder / "transformer")
    family = family_of(checkpoint.config)
    with torch.device("meta"):
        network = family.network(family.config.from_dict(checkpoint.config))
    return checkpoint, family, network


@pytest.mark.benchmark(group="passes: names and shapes compared")
def test_check(benchmark, parts):
    checkpoint, family, network = parts
    benchmark(check, network.state_dict(), checkpoint, family.layout)


@pytest.mark.benchmark(group="passes: weights read, unfolded")
def test_materialize(benchmark, parts):
    checkpoint, family, _ = parts

    def read():
        with torch.device("meta"):
            network = family.network(family.config.from_dict(checkpoint.config))
        materialize(network, checkpoint, family.layout, CPU, torch.float32)

    benchmark(read)


@pytest.mark.benchmark(group="passes: time folded into tables")
@pytest.mark.parametrize("nfe", [1, 4])
def test_fold(benchmark, parts, nfe):
    checkpoint, _, network = parts
    tables = benchmark(fold, network, checkpoint.get, schedule(preset(nfe), torch.float32))
    assert all(table.isfinite().all() for table in tables.values())


@pytest.mark.benchmark(group="passes: implementations chosen")
def test_select(benchmark):
    benchmark(select, Target.of(CPU, torch.float32))


@pytest.mark.benchmark(group="passes: all of a network")
@pytest.mark.parametrize("nfe", [1, 4])
def test_compile(benchmark, parts, nfe):
    checkpoint, family, _ = parts
    times = schedule(preset(nfe), torch.float32)
    benchmark(lambda: compile_network(Recipe(checkpoint, family, CPU, torch.float32), times))


@pytest.mark.benchmark(group="passes: loading a model")
@pytest.mark.parametrize("saved", [False, True], ids=["folder", "artifact"])
def test_load(benchmark, pipe, tmp_path, saved):
    folder = pipe.save(tmp_path / "artifact") if saved else pipe.folder
    benchmark(load, folder, device="cpu")
