"""One real record of a tiny model, shared by the tests of the bench."""

from __future__ import annotations

import copy

import pytest

from tests.factory import make_model
from twinflow_rt import bench
from twinflow_rt.bench import ceilings


@pytest.fixture(scope="session", autouse=True)
def small_ceilings():
    """Ceilings of small matrices and copies: the tests want the path, not the peak."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "gemm_size", lambda device, native: 256)
        patch.setitem(ceilings.COPY_BYTES, "cpu", 32 << 20)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(scope="session")
def measured(tiny, small_ceilings):
    said: list[str] = []
    record = bench.run(
        tiny, device="cpu", size=(32, 24), peers=("eager", "diffusers"), repeats=5, warmup=1, cold_runs=1,
        batches=(1, 2), evaluations=(1, 2), command="twinflow-rt bench tiny", say=said.append,
    )  # fmt: skip
    return record, said


@pytest.fixture
def record(measured):
    return copy.deepcopy(measured[0])
