"""What the suites share: the model to measure (`--model`, default the shipped one), one thread per core asked for."""

from __future__ import annotations

import os

import pytest
import torch

from twinflow_rt import load


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", default="demo", help="model folder that stages and end-to-end suites measure")


def pytest_configure(config: pytest.Config) -> None:
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--model")


@pytest.fixture(scope="session")
def pipe(model):
    return load(model, device="cpu", dtype="float32")
