"""Outputs are whole or not there: a failure in the middle leaves no partial file, and the old one intact."""

from __future__ import annotations

import ast
import json
import os
import re
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import safetensors.torch
from PIL import Image

import twinflow_rt
from tests.bad_input.conftest import refused
from twinflow_rt import cli
from twinflow_rt.bench import html, record
from twinflow_rt.checkpoint import atomic, image_files
from twinflow_rt.cli import eval as evaluate
from twinflow_rt.convert import convert
from twinflow_rt.errors import ConfigError, StorageError
from twinflow_rt.evaluate.generator import Generator
from twinflow_rt.stages import embeds_file

RECORD = Path(__file__).parents[2] / "benches" / "records" / "demo-cpu.json"
unix = pytest.mark.skipif(sys.platform == "win32", reason="pipes of Unix")
FULL = OSError(28, "No space left on device")


def write_image(target: Path, pipe) -> None:
    image_files.save_image(Image.new("RGB", (8, 8)), target.with_suffix(".png"))


def write_record(target: Path, pipe) -> None:
    record.save(json.loads(RECORD.read_text()), target)


def write_page(target: Path, pipe) -> None:
    html.save(json.loads(RECORD.read_text()), target)


def write_artifact(target: Path, pipe) -> None:
    pipe.save(target)


def write_conversion(target: Path, pipe) -> None:
    convert([pipe.folder / "vae"], pipe.folder, target)


def write_embeds(target: Path, pipe) -> None:
    embeds_file.write(target, pipe.text(["a"]), model="m", family="z-image", text=pipe.text)


def write_sheet(target: Path, pipe) -> None:
    evaluate.sheet(Generator(pipe, pipe.sampler), target.with_suffix(".png"), columns=1)


FILES = [write_image, write_record, write_page, write_embeds]
FOLDERS = [write_artifact, write_conversion]


def break_in_the_middle(monkeypatch) -> None:
    """Every way to write a file writes half of it and finds the disk full."""

    def half_text(self, text, *args, **kwargs):
        with open(self, "w", encoding="utf-8") as file:
            file.write(text[: len(text) // 2])
        raise FULL

    def half_tensors(tensors, filename, *args, **kwargs):
        Path(filename).write_bytes(b"half")
        raise FULL

    def half_image(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise FULL

    monkeypatch.setattr(Path, "write_text", half_text)
    monkeypatch.setattr(safetensors.torch, "save_file", half_tensors)
    monkeypatch.setattr(Image.Image, "save", half_image)


@pytest.mark.parametrize("write", FILES)
@pytest.mark.parametrize("old", [None, b"the old one"])
def test_files(pipe, tmp_path, monkeypatch, write, old):
    name = "out.png" if write is write_image else "out"
    if old is not None:
        (tmp_path / name).write_bytes(old)
    with monkeypatch.context() as broken:
        break_in_the_middle(broken)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / "out", pipe)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({} if old is None else {name: old})
    write(tmp_path / "out", pipe)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() != old


@pytest.mark.parametrize("write", FOLDERS)
def test_folders(pipe, tmp_path, monkeypatch, write):
    with monkeypatch.context() as broken:
        break_in_the_middle(broken)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / "out", pipe)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "out", pipe)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    refused(lambda: write(tmp_path / "out", pipe), "exists")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_interrupts_leave_nothing(tmp_path):
    for error in (KeyboardInterrupt, SystemExit, MemoryError):
        with pytest.raises(error), atomic.replacing(tmp_path / "a") as partial:
            partial.write_text("half")
            raise error
        with pytest.raises(error), atomic.new_folder(tmp_path / "b") as partial:
            (partial / "c").write_text("half")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_refused_goes(tmp_path):
    def verify(partial: Path) -> None:
        raise ConfigError("no good; make it again")

    with pytest.raises(ConfigError), atomic.new_folder(tmp_path / "a", verify) as partial:
        (partial / "b").write_text("whole")
    assert list(tmp_path.iterdir()) == []


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "a", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_threads_that_write_one_file_do_not_mix(tmp_path):
    """Whoever is last wins; no reader ever sees anything but one whole content."""
    texts = [str(i) * 100_000 for i in range(8)]
    atomic.write_text(tmp_path / "a", texts[0])
    threads = [threading.Thread(target=atomic.write_text, args=(tmp_path / "a", text)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert (tmp_path / "a").read_text() in texts
    assert (tmp_path / "a").read_text() in texts and os.listdir(tmp_path) == ["a"]


def test_the_longest_name_can_be_written(tmp_path):
    atomic.write_text(tmp_path / ("x" * 255), "a")
    assert os.listdir(tmp_path) == ["x" * 255]


@pytest.mark.parametrize("name", ["folder", "none/a", "file/a", "x" * 256, "a\0b", "loop/a"])
def test_targets_that_cannot_be(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: atomic.check_target(tmp_path / name, "--output"), "--output", ConfigError)


def test_links_are_followed_and_permissions_kept(tmp_path):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "a"
    (tmp_path / "link").symlink_to(target)
    atomic.check_target(tmp_path / "link", "--output")
    atomic.write_text(tmp_path / "link", "new")  # a link to nothing yet
    target.chmod(0o640)
    atomic.write_text(tmp_path / "link", "newer")
    assert (tmp_path / "link").is_symlink() and target.read_text() == "newer"
    assert target.stat().st_mode & 0o777 == 0o640 and os.listdir(tmp_path / "there") == ["a"]


@unix
def test_pipes_and_devices_are_written_into(tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    image_files.check_image_path(pipe, "--output")
    image_files.save_image(Image.new("RGB", (8, 8)), pipe)
    reader.join(10)
    assert read[0].startswith(b"\x89PNG")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe.png"]
    atomic.check_target(Path(os.devnull), "--json")
    atomic.write_text(os.devnull, "a")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@unix
def test_standard_output_is_written_into(tmp_path):
    """A pipe or a file, by any of its names; what the command says goes elsewhere."""
    command = [sys.executable, "-m", "twinflow_rt.cli", "generate", "a", "--size", "32", "--seed", "1", "-o"]
    done = subprocess.run([*command, "/dev/stdout"], capture_output=True, check=True)
    assert done.stdout.startswith(b"\x89PNG") and done.stdout.endswith(b"IEND\xaeB`\x82") and b"wrote" in done.stderr
    write = "from twinflow_rt.checkpoint import atomic; atomic.write_text('/dev/fd/1', 'b')"
    (tmp_path / "a").write_text("a")
    with (tmp_path / "a").open("a") as file:
        subprocess.run([sys.executable, "-c", write], stdout=file, check=True)
    assert (tmp_path / "a").read_text() == "ab" and os.listdir(tmp_path) == ["a"]
    refused(lambda: image_files.output_paths(Path(os.devnull), 2), "takes one image, not 2", ConfigError)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc")
def test_folders_that_nobody_writes_to(tmp_path):
    """Permissions say that root may; only trying tells."""
    refused(lambda: atomic.check_target(Path("/proc/a.png"), "--output"), "/proc is not writable", ConfigError)
    (tmp_path / "a").write_text("")
    refused(lambda: atomic.check_target(tmp_path / "a", "-o", make_parents=True), "exists and is no folder")
    assert os.listdir(tmp_path) == ["a"]


def test_saving_asks_before_the_work(pipe, monkeypatch):
    monkeypatch.setattr(pipe.program, "restore", lambda schedule: pytest.fail("worked"))
    refused(lambda: pipe.save(Path("/proc/none/a")), "is not writable", ConfigError)


def test_read_only_files_are_refused(tmp_path):
    """By the owner's wish, so root, who could, does not either."""
    file = tmp_path / "a.png"
    file.write_bytes(b"old")
    file.chmod(0o444)
    refused(lambda: image_files.check_image_path(file, "--output"), "read-only", ConfigError)
    with pytest.raises(StorageError, match="read-only"):
        image_files.save_image(Image.new("RGB", (8, 8)), file)
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("write", FOLDERS)
def test_of_two_writers_of_a_folder_the_later_is_refused(pipe, tmp_path, monkeypatch, write):
    """Both begin when nothing is there; neither disturbs the other, and the first to finish stays."""
    inside = threading.Barrier(2, timeout=30)
    plain, outcomes = atomic.scratch_folder, []

    @contextmanager
    def meeting(parent):
        with plain(parent) as partial:
            inside.wait()
            yield partial

    def run():
        try:
            write(tmp_path / "out", pipe)
            outcomes.append("written")
        except ConfigError as error:
            outcomes.append(str(error))

    monkeypatch.setattr(atomic, "scratch_folder", meeting)
    monkeypatch.setattr(pipe, "_lock", nullcontext())  # as of two pipelines
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[1] == "written" and "was written meanwhile" in sorted(outcomes)[0]
    assert os.listdir(tmp_path) == ["out"] and list((tmp_path / "out").iterdir())


def test_what_killed_processes_left_goes_and_nothing_else(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here, other = atomic._machine(), "0" * 8
    gone = [f".twinflow-{here}-{ended.pid}-aa.part", f".twinflow-{here}-{os.getpid()}-aa.part"]  # a number used again
    stays = [f".twinflow-{here}-{os.getppid()}-aa.part", f".twinflow-{other}-{ended.pid}-aa.part", ".a.partial", "b"]
    for name in gone + stays:
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text("half")
    (tmp_path / (file := f".twinflow-{here}-{ended.pid}-bb.part")).write_text("half")
    with atomic.new_folder(tmp_path / "new") as partial:
        assert {p.name for p in tmp_path.iterdir()} == {*stays, partial.name} and file not in stays
        with atomic.scratch_folder(tmp_path):  # another writer here, now
            assert partial.is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {*stays, "new"}


def test_the_first_file_in_a_folder_removes_what_killed_processes_left_there(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".twinflow-{atomic._machine()}-{ended.pid}-aa.part").write_text("half")
    (tmp_path / (other := f".twinflow-{atomic._machine()}-{os.getppid()}-aa.part")).write_text("being written")
    atomic.write_text(tmp_path / "a", "whole")
    assert {p.name for p in tmp_path.iterdir()} == {other, "a"}


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    sync, replace, rename = os.fsync, os.replace, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(Path(f"/proc/self/fd/{fd}").resolve().name), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("renamed"), replace(a, b)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (order.append("renamed"), rename(a, b)))
    atomic.write_text(tmp_path / "a", "x")
    assert order[0].endswith(".part") and order[1:] == ["renamed", tmp_path.name]
    order.clear()
    with atomic.new_folder(tmp_path / "f") as partial:
        (partial / "b").write_text("x")
    assert order[0] == "b" and order[1].endswith(".part") and order[2:] == ["renamed", tmp_path.name]


def test_training_tries_its_folder_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["train", "demo", "--out", str(tmp_path / "file" / "run")]) == 2
    assert capsys.readouterr().err.startswith("twinflow-rt: --out ")


# what writes in place, and why that is right
IN_PLACE = {
    "bench/memory.py": "a switch in /proc", "bench/probe.py": "a pipe to perf",
    "bench/random_file.py": "a declaration for benchmarks, in a folder being made",
    "bench/random_weights.py": "a temporary model for one measurement", "checkpoint/artifact.py": "inside `new_folder`",
    "checkpoint/atomic.py": "the helper itself", "checkpoint/image_files.py": "to the name that `replacing` gives",
    "cli/batch.py": "to the name that `replacing` gives", "checkpoint/shards.py": "inside `new_folder`",
    "serve/app.py": "to memory", "serve/batch.py": "to memory", "stages/result.py": "to memory",
    "stages/embeds_file.py": "to the name that `replacing` gives",
    "training/autoencoder.py": "inside `new_folder`", "training/demo.py": "to the name that `replacing` gives",
    "training/own_samples.py": "to the name that `replacing` gives",
    "training/export.py": "inside `new_folder`",
    "training/trainer.py": "to the name that `replacing` gives; the curve grows line by line",
}  # fmt: skip
METHODS = {"write_text", "write_bytes", "save_pretrained", "save_file", "save", "dump", "tofile"}
OF_OURS = {"html", "precisions", "record"}  # modules whose `save` is atomic


def writes(call: ast.Call) -> bool:
    """Whether a call writes a file in place."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name == "open":
        modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        return any(isinstance(mode, str) and re.fullmatch("[wax][bt+]*", mode) for mode in modes)
    method = isinstance(call.func, ast.Attribute)
    ours = method and getattr(call.func.value, "id", "") in OF_OURS
    return (method and not ours and name in METHODS) or name == "save_file"


def test_no_other_module_writes_files():
    """A new writer has to use `atomic`, or say here why not."""
    root = Path(twinflow_rt.__file__).parent
    trees = {str(p.relative_to(root)): ast.parse(p.read_text()) for p in root.rglob("*.py")}
    found = {name for name, tree in trees.items() if any(isinstance(n, ast.Call) and writes(n) for n in ast.walk(tree))}
    known = {name for name in found if name in IN_PLACE or name.startswith(("export/",))}
    assert found == known, f"{sorted(found - known)} write files in a way of their own"
