"""The models that promises are tested on: the demo, and a small one of every family."""

from __future__ import annotations

import pytest

from tests.factory import make_model
from twinflow_rt.loading import load


@pytest.fixture(scope="session")
def demo():
    return load("demo", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """family -> its model folder, made once."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp(family) / "m", family)
        return made[family]

    return folder
