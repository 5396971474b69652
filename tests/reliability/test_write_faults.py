"""Writing that is killed, or runs out of disk: nothing half-written is left that loads, or that is in the way."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.factory import make_model
from twinflow_rt.checkpoint import artifact, atomic
from twinflow_rt.cli import main
from twinflow_rt.errors import CheckpointError, StorageError, TwinFlowError
from twinflow_rt.loading import load

SAVE = """
import sys, time, twinflow_rt
pipe = twinflow_rt.load(sys.argv[1], device="cpu")
pipe.plan
print("loaded", flush=True)
began = time.perf_counter()
for i in range(1000):
    pipe.save(f"{sys.argv[2]}/{i}")
    if i == 0:
        print(time.perf_counter() - began, flush=True)
"""
LIMITED = """
import resource, sys, twinflow_rt
pipe = twinflow_rt.load(sys.argv[1], device="cpu")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for size in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        pipe.save(sys.argv[2])
        print("saved")
    except twinflow_rt.StorageError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
pipe.save(sys.argv[2])
"""
ARGS = {"height": 16, "width": 24, "seed": 3, "output": "np"}
unix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of Unix")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("source") / "m")


@unix
@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.full)])
def test_killed_while_saving(model, tmp_path, rounds):
    """kill -9 at a random moment of one save after another: what has the artifact's name loads, all of it."""
    draw = random.Random(0)
    process = subprocess.Popen([sys.executable, "-c", SAVE, model, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "loaded\n"
    seconds = float(process.stdout.readline())
    killed_within = 0
    for i in range(60):
        if i >= rounds and killed_within:  # about half of the moments are between saves
            break
        time.sleep(draw.uniform(0, 2 * seconds))
        process.send_signal(signal.SIGSTOP)  # look at it as a kill now would leave it
        for folder in tmp_path.iterdir():
            if folder.name.startswith("."):
                killed_within += 1
                with suppress(CheckpointError):  # as long as it is not whole
                    load(folder, device="cpu")
            else:
                artifact.read(folder)
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    process.stdout.close()
    whole = [folder for folder in tmp_path.iterdir() if not folder.name.startswith(".")]
    assert killed_within and whole
    assert load(max(whole, key=lambda f: int(f.name)), device="cpu")("a", **ARGS).images.shape == (1, 16, 24, 3)
    rest = [folder for folder in tmp_path.iterdir() if folder.name.startswith(".")]
    assert len(rest) <= 1
    load(model, device="cpu").save(tmp_path / "new")  # what is left is in nobody's way, and goes
    assert not [folder for folder in tmp_path.iterdir() if folder.name.startswith(".")]


@unix
def test_disk_full(model, tmp_path):
    """A limit on file sizes, which the system enforces as it does a full disk."""
    target = tmp_path / "artifact"
    sizes = ["200", "5000", "100000"]
    command = [sys.executable, "-c", LIMITED, model, target, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("could not be written" in x and "free some space" in x for x in lines), lines
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    load(target, device="cpu")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_files_the_system_refuses(tmp_path, monkeypatch, capsys, code):
    """A picture, through the command line: one line that says why, and what stood there before still does."""
    old = tmp_path / "out.png"
    old.write_bytes(b"old")

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match=os.strerror(code)) as error, atomic.replacing(old) as partial:
        partial.write_bytes(b"new")
    assert isinstance(error.value, TwinFlowError) and isinstance(error.value, OSError)
    command = ["generate", "a", "-o", str(old), "--size", "32x32", "--device", "cpu", "--seed", "1"]
    assert main(command) == 2 and os.strerror(code) in capsys.readouterr().err
    assert old.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_nothing_is_written_unasked(model, tmp_path):
    """Loading and generating write nothing: not to the model, the home folder, a cache, or the working folder.
    So all of them may be read-only. (Root, as whom tests may run, could write to a read-only folder.)"""
    home = tmp_path / "home"
    home.mkdir()
    code = f"import twinflow_rt; twinflow_rt.load({str(model)!r}, device='cpu')('a', height=16, width=16, seed=0)"
    before = {p: p.stat().st_mtime_ns for p in model.rglob("*")}
    root, cache = str(Path(__file__).parents[2]), str(home / "cache")
    ours = {"HOME": str(home), "XDG_CACHE_HOME": cache, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=home, env={**os.environ, **ours})
    assert not list(home.iterdir()) and {p: p.stat().st_mtime_ns for p in model.rglob("*")} == before


def test_converted_folders_are_whole_or_absent(model, tmp_path):
    """`new_folder`, which conversions and exports write through, too."""
    with pytest.raises(StorageError, match="No space left"), atomic.new_folder(tmp_path / "f") as partial:
        (partial / "a").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ZeroDivisionError), atomic.new_folder(tmp_path / "f") as partial:
        (partial / "a").write_text(json.dumps(1 / 0))
    assert not list(tmp_path.iterdir())
