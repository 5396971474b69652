"""Saved programs: the same pixels back, and nothing half-written, changed or differently scheduled loads."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.factory import make_model
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.passes import artifact
from twinflow_rt.pipeline import load

ARGS = {"height": 16, "width": 24, "seed": 3, "output": "np"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("source") / "m")


@pytest.fixture
def saved(model, tmp_path):
    return load(model, device="cpu", nfe=2).save(tmp_path / "artifact")


def test_artifact_gives_the_same_images_without_the_source(model, saved):
    expected = load(model, device="cpu", nfe=2)("a red circle", **ARGS)
    again = load(saved, device="cpu")
    assert np.array_equal(again("a red circle", **ARGS).images, expected.images)
    names = [n for n, _ in again.program.network.named_parameters()]
    assert not any("adaLN" in n or "t_embedder" in n for n in names)
    manifest = json.loads((saved / "artifact.json").read_text())
    assert manifest["source"] == artifact.source_hash(model / "transformer")


@pytest.mark.parametrize("change", [{"nfe": 1}, {"nfe": 4}])
def test_another_schedule_is_refused_by_name(saved, change):
    with pytest.raises(ConfigError, match=r"folded for 2 evaluation\(s\) at \(t, tt\) = "):
        load(saved, device="cpu", **change)
    with pytest.raises(ConfigError, match="needs the checkpoint"):
        load(saved, device="cpu")("a red circle", **ARGS, **change)


def test_existing_target_is_left_alone(model, saved):
    before = (saved / "artifact.json").read_bytes()
    with pytest.raises(CheckpointError, match="not overwritten"):
        load(model, device="cpu").save(saved)
    assert (saved / "artifact.json").read_bytes() == before


def flip_a_bit(folder):
    path = folder / "transformer" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncate(folder):
    path = folder / "vae" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edit_manifest(**changes):
    def edit(folder):
        path = folder / "artifact.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "does not match the hash"),
        (truncate, "does not match the hash"),
        (lambda f: (f / "vae" / "model.safetensors").unlink(), "missing or not part"),
        (lambda f: (f / "extra.txt").write_text("x"), "missing or not part"),
        (lambda f: (f / "artifact.json").write_text('{"schema": 1'), "not readable JSON"),
        (edit_manifest(schema=99), "schema 99"),
        (edit_manifest(files=[]), "file list"),
        (edit_manifest(plan={"schema": 7}), "schema 7"),
    ],
)
def test_damaged_artifacts_are_refused(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load(saved, device="cpu")


def test_failed_save_leaves_nothing(model, tmp_path, monkeypatch):
    pipe = load(model, device="cpu")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "sha256", full)
    monkeypatch.setattr(artifact, "source_hash", lambda folder: "")
    with pytest.raises(OSError, match="No space"):
        pipe.save(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []
