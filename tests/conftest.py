"""What tests share: marked GPU tests, one CPU thread pool, outputs poisoned with NaN, miniatures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network


settings.register_profile("repeatable", derandomize=True)  # a run passes or fails for the code's sake alone
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


BUILDS = ("tests/export", "tests/native", "tests/bench")  # folders whose files share something slow to make


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Have `pytest -n` give each worker whole files (or folders of BUILDS), as fixtures are made once for those, in
    the order of a plain run: the long ones are not among the last."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((folder for folder in BUILDS if file.startswith(f"{folder}/")), file)

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a miniature Z-Image."""
    from tests.factory import make_model

    return make_model(tmp_path_factory.mktemp("z") / "m")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a miniature Qwen-Image."""
    from tests.factory import make_model

    return make_model(tmp_path_factory.mktemp("q") / "m", "qwen-image")


@pytest.fixture
def nan_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory becomes NaN (or 101 for integers), so that an element a kernel forgets shows."""
    plain, plain_like, plain_new = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan") if x.is_floating_point() else 101)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(plain_new(*a, **k)))
