"""`twinflow-rt batch`: prompt files, what a run leaves behind, and going on with one."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from tests.factory import make_model
from twinflow_rt import cli
from twinflow_rt.cli.prompt_file import read_rows
from twinflow_rt.errors import CheckpointError, DeviceError
from twinflow_rt.loading import load
from twinflow_rt.serve import batch

PROMPTS = ["a red circle", "ein grünes Kreuz ✓", "two, with \"quotes\""]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("batch") / "tiny"))


@pytest.fixture
def make(model, tmp_path, capsys):
    """Runs the command on a prompt file of this content; (exit status, what it printed)."""

    def run(content: str, *args, name="prompts.txt"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        argv = ["batch", model, tmp_path / name, "-o", tmp_path / "out", "--device", "cpu", "--size", "16", *args]
        return cli.main([str(a) for a in argv]), capsys.readouterr()

    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def manifest(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_prompt_becomes_its_image(make, model, tmp_path):
    status, said = make("\n".join(PROMPTS[:2]) + "\n\n" + PROMPTS[2], "--num-images", 2, "--seed", 5)
    out = tmp_path / "out"
    assert status == 0 and f"wrote 6 images to {out}" in said.out
    names = [f"{k:06d}.png" for k in range(6)]
    assert sorted(os.listdir(out)) == [*names, "manifest.jsonl"]
    rows, pipe = manifest(out), load(model, device="cpu")
    assert [row["file"] for row in rows] == names and [row["seed"] for row in rows] == list(range(5, 11))
    assert [row["prompt"] for row in rows] == [p for p in PROMPTS for _ in range(2)]
    for row in rows:
        alone = pipe(row["prompt"], seed=row["seed"], width=16, height=16, output="np").images[0]
        assert np.abs(pixels(out / row["file"]) - alone).max() <= 1
        assert batch.recorded(out / row["file"]) == row


def test_rows_have_seeds_and_sizes(make, tmp_path):
    rows = [{"prompt": "a", "seed": 9, "width": 24, "id": 1}, {"prompt": "b"}, {"prompt": "c", "seed": None}, "d"]
    assert make("\n".join(map(json.dumps, rows)), "--seed", 100, name="p.jsonl")[0] == 0
    made = manifest(tmp_path / "out")
    assert [(row["prompt"], row["seed"]) for row in made] == [("a", 9), ("b", 101), ("c", 102), ("d", 103)]
    assert pixels(tmp_path / "out" / "000000.png").shape == (16, 24, 3)
    assert pixels(tmp_path / "out" / "000001.png").shape == (16, 16, 3)


def test_one_rule_for_text(model, tmp_path, capsys):
    """A byte order mark, Windows' line ends, blanks around, empty lines; what only some programs call a line end
    is part of the prompt. `encode` reads the same."""
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbf  a red circle \r\n\r\n\t\nwith\x0cfeed \xe2\x80\xa8 and separator\nlast")
    prompts = ["a red circle", "with\x0cfeed \u2028 and separator", "last"]
    assert [row["prompt"] for row in read_rows(file)] == prompts
    out = tmp_path / "p.safetensors"
    assert cli.main(["encode", "--model", model, "--device", "cpu", "--file", str(file), "-o", str(out)]) == 0
    from twinflow_rt.stages.embeds_file import read

    assert list(read(out).names()) == prompts
    for name in ("absent.txt", "p.csv", "."):
        capsys.readouterr()
        assert cli.main(["encode", "--model", model, "--file", str(tmp_path / name), "-o", str(out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(CheckpointError, match="a pipe"):
        read_rows(tmp_path / "pipe.txt")


def test_parquet(make, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = pyarrow.table({"prompt": PROMPTS, "seed": [1, None, 3], "width": [16, 24, 16]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert read_rows(tmp_path / "p.parquet") == [
        {"prompt": PROMPTS[0], "seed": 1, "width": 16},
        {"prompt": PROMPTS[1], "width": 24},
        {"prompt": PROMPTS[2], "seed": 3, "width": 16},
    ]
    (tmp_path / "p.parquet").write_bytes(b"PAR1 cut short")
    assert make("", name="other.txt")[0] == 2
    assert cli.main(["batch", "demo", str(tmp_path / "p.parquet"), "-o", str(tmp_path / "o")]) == 2


def test_a_stopped_run_goes_on(make, model, tmp_path, monkeypatch):
    out, count = tmp_path / "out", 0
    paint = batch.paint

    def fails_later(pipe, requests, on_oom):
        nonlocal count
        count += 1
        if count == 3:
            raise DeviceError("out of memory")
        return paint(pipe, requests, on_oom)

    prompts = "\n".join(f"prompt {k}" for k in range(7))
    monkeypatch.setattr(batch, "paint", fails_later)
    status, said = make(prompts, "--batch-size", 2)
    assert status == 2 and "out of memory" in said.err
    assert [row["seed"] for row in manifest(out)] == [0, 1, 2, 3] and len(os.listdir(out)) == 5
    before = {name: (out / name).stat().st_mtime_ns for name in os.listdir(out) if name.endswith(".png")}

    monkeypatch.setattr(batch, "paint", paint)
    status, said = make(prompts, "--batch-size", 2)
    assert status == 2 and "add --resume" in said.err  # nothing is overwritten unasked
    status, said = make(prompts, "--resume", "--batch-size", 3)
    assert status == 0 and "wrote 3 images" in said.out and "kept 4" in said.out
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert [row["seed"] for row in manifest(out)] == list(range(7))

    monkeypatch.setattr("twinflow_rt.loading.load_opened", lambda *a, **k: pytest.fail("nothing is left to make"))
    assert make(prompts, "--resume")[0] == 0
    status, said = make(prompts, "--resume", "--nfe", 2)
    assert status == 2 and "000000.png was made of another request" in said.err


def test_images_of_others_and_broken_files_are_refused(make, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (2, 2)).save(out / "000000.png")
    assert "another request" in make("a", "--resume")[1].err
    (out / "000000.png").write_bytes(b"\x89PNG cut")
    status, said = make("a", "--resume")
    assert status == 2 and "000000.png is no image that can be read" in said.err


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "p.txt", "holds no prompt"),
        ("a", "p.csv", "must end in one of .txt, .jsonl, .parquet"),
        ('{"prompt": "a"}\n{"text": "b"}', "p.jsonl", "line 2: no text named 'prompt'"),
        ('{"prompt": "a", "seed": "7"}', "p.jsonl", "line 1: seed must be an integer, not '7'"),
        ('{"prompt": "a", "width": true}', "p.jsonl", "line 1: width"),
        ("{", "p.jsonl", "line 1 is not JSON"),
        ("3", "p.jsonl", "line 1: no text"),
        ('{"prompt": "a", "seed": -1}', "p.jsonl", "seed must be"),
        ('{"prompt": "a", "width": 17}', "p.jsonl", "the nearest is 16"),
    ],
)
def test_rows_that_cannot_work(make, content, name, message):
    status, said = make(content, name=name)
    last = said.err.splitlines()[-1]
    assert status == 2 and message in last and last.startswith("twinflow-rt: ") and "Traceback" not in said.err


def test_ray_that_is_missing_is_named(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    status, said = make("a", "--ray")
    assert status == 2 and "--ray needs ray: pip install '.[ray]'" in said.err
    assert cli.main(["serve", "demo", "--port", "0", "--ray"]) == 2


def test_options_that_cannot_work(make, tmp_path):
    assert "batch_size" in make("a", "--batch-size", 0)[1].err
    assert "num_images" in make("a", "--num-images", 0)[1].err
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    assert cli.main(["batch", "demo", str(tmp_path / "latin.txt"), "-o", str(tmp_path / "o")]) == 2
    assert cli.main(["batch", "demo", str(tmp_path / "absent.txt"), "-o", str(tmp_path / "o")]) == 2
