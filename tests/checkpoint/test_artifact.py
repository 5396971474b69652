"""Saved programs: the same pixels back, and nothing half-written, changed or differently scheduled loads."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import qwen_image_factory
from tests.factory import make_model
from twinflow_rt.checkpoint import artifact, shards
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.loading import load

ARGS = {"height": 16, "width": 24, "seed": 3, "output": "np"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("source") / "m")


@pytest.fixture(scope="module")
def original(model):
    return load(model, device="cpu", nfe=2).save(model.parent / "artifact")


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "artifact")


def test_artifact_gives_the_same_images_without_the_source(model, saved):
    expected = load(model, device="cpu", nfe=2)("a red circle", **ARGS)
    again = load(saved, device="cpu")
    assert np.array_equal(again("a red circle", **ARGS).images, expected.images)
    names = [n for n, _ in again.program.network.named_parameters()]
    assert not any("adaLN" in n or "t_embedder" in n for n in names)
    manifest = json.loads((saved / "artifact.json").read_text())
    assert manifest["source"] == artifact.source_hash(Checkpoint(model / "transformer"))


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
    monkeypatch.setattr(artifact, "source_hash", lambda network: "")
    with pytest.raises(OSError, match="No space"):
        pipe.save(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def save_and_die(pipe, target, step: int) -> bool:
    """Saves in a forked process that kills itself at the given step of writing, in the middle of a file
    where the step writes one. Returns whether it got there."""
    pid = os.fork()
    if pid:
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    steps = iter(range(1000))

    def dying(run):
        def call(*args, **kwargs):
            if next(steps) < step:
                return run(*args, **kwargs)
            if run is artifact._write_tensors:
                run(*args, **kwargs)
                file = args[0] / "model.safetensors"
                os.truncate(file, file.stat().st_size // 2)
            if run is write_text:
                run(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    write_text = Path.write_text
    Path.write_text = dying(write_text)
    artifact.shutil.copy, artifact.shutil.copytree = dying(shutil.copy), dying(shutil.copytree)
    artifact._write_tensors, artifact.sha256 = dying(artifact._write_tensors), dying(artifact.sha256)
    try:
        pipe.save(target)
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_step_nothing_loads(model, tmp_path):
    pipe, target = load(model, device="cpu"), tmp_path / "artifact"
    assert pipe.plan.stages  # counted here, not in every child
    for step in itertools.count():
        if not save_and_die(pipe, target, step):
            break
        assert not target.exists()
        for folder in (target, *tmp_path.iterdir()):
            with pytest.raises(CheckpointError):
                load(folder, device="cpu")
    assert step > 15 and [p.name for p in tmp_path.iterdir()] == ["artifact"]
    assert np.array_equal(load(target, device="cpu")("a", **ARGS).images, pipe("a", **ARGS).images)


def test_large_networks_are_written_in_shards(model, tmp_path, monkeypatch):
    """No shard above the limit, unless one tensor is; the same images back."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    pipe = load(model, device="cpu")
    saved = pipe.save(tmp_path / "artifact")
    index = json.loads((saved / "transformer" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((saved / "transformer" / file).stat().st_size < 210_000 for file in files)
    assert np.array_equal(load(saved, device="cpu")("a", **ARGS).images, pipe("a", **ARGS).images)


def test_precision_and_source_are_recorded(model, tmp_path):
    """Saved in bfloat16, computed in float32, saved again: the source stays the checkpoint."""
    first = load(model, device="cpu", dtype="bfloat16").save(tmp_path / "first")
    pipe = load(first, device="cpu", dtype="float32")
    assert (pipe.plan.dtype, pipe.dtype) == ("float32", torch.float32)
    assert "compiled for bfloat16 on cpu and saved" in str(pipe.plan)
    manifests = [json.loads((f / "artifact.json").read_text()) for f in (first, pipe.save(tmp_path / "second"))]
    assert [m["plan"]["dtype"] for m in manifests] == ["bfloat16", "float32"]
    assert {m["source"] for m in manifests} == {artifact.source_hash(Checkpoint(model / "transformer"))}


def test_another_precision_is_as_if_compiled_for_it(model, tmp_path):
    saved = load(model, device="cpu", dtype="float32").save(tmp_path / "artifact")
    for dtype in ("bfloat16", "float32"):
        again, fresh = (load(m, device="cpu", dtype=dtype).program.network.state_dict() for m in (saved, model))
        assert all(v.dtype == fresh[k].dtype and torch.equal(v, fresh[k]) for k, v in again.items())


def test_absorbed_networks_save_and_load(tmp_path):
    """Qwen-Image at one evaluation: its constants are inside the weights, and the artifact says so."""
    pipe = load(qwen_image_factory.make_model(tmp_path / "m"), device="cpu")
    saved = pipe.save(tmp_path / "artifact")
    again = load(saved, device="cpu")
    assert pipe.plan.absorbed and again.plan.absorbed and not list(again.program.network.buffers())
    assert json.loads((saved / "artifact.json").read_text())["plan"]["absorbed"] is True
    args = {"height": 32, "width": 48, "seed": 3, "output": "np"}
    assert np.array_equal(again("a red circle", **args).images, pipe("a red circle", **args).images)
    with pytest.raises(ConfigError, match="needs the checkpoint"):
        again("a red circle", **args, nfe=2)


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_what_is_saved_does_not_depend_on_calls_made_before(tmp_path, family):
    """The schedule of loading, with constants where loading puts them; and the plan says what save will do."""
    pipe = load(make_model(tmp_path / "m", family), device="cpu")
    loaded, first = pipe.plan, pipe.save(tmp_path / "first")
    pipe("a", height=32, width=32, seed=1, nfe=2)
    assert len(pipe.plan.schedule) == 2 and "go back to 1 evaluation" in pipe.plan.notes[-1]
    second = pipe.save(tmp_path / "second")
    assert pipe.plan.schedule == loaded.schedule and pipe.plan.absorbed == loaded.absorbed
    assert not any("go back" in note for note in pipe.plan.notes)
    hashes = [json.loads((folder / "artifact.json").read_text())["files"] for folder in (first, second)]
    assert hashes[0] == hashes[1] and load(second, device="cpu").plan.schedule == loaded.schedule
