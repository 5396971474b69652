"""The models that promises are tested on: the demo, and a small one of every family."""

from __future__ import annotations

import pytest

from tests import factory, qwen_image_factory, sana_factory, sd3_factory
from twinflow_rt.loading import load

FACTORIES = {
    "z-image": factory.make_model, "qwen-image": qwen_image_factory.make_model, "sd3": sd3_factory.make_model,
    "sana": sana_factory.make_model,
}  # fmt: skip


@pytest.fixture(scope="session")
def demo():
    return load("demo", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """family -> its model folder, made once."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = FACTORIES[family](tmp_path_factory.mktemp(family) / "m")
        return made[family]

    return folder
