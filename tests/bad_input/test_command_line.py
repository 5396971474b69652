"""The command line: status 2 and one line on stderr for bad input, and nothing written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input.conftest import edit_json
from twinflow_rt import cli
from twinflow_rt.checkpoint.files import MAX_HEADER


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """The working folder: a folder, a file, and files that are nothing of what is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "seed": 1.5}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    (tmp_path / "huge.safetensors").write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{}")
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04N.")
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def run(argv: list[str], capsys) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse's own refusals
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


GENERATE = [
    (["--seed", "-1"], "seed"), (["--seed", str(2**64)], "seed"),
    (["--seed", "1.0"], "invalid int"), (["--seed", "nan"], "invalid int"), (["--seed", "True"], "invalid int"),
    (["--seed", "9" * 5000], "invalid int"), (["--size", "0"], "height 0|width 0"),
    (["--size", "-64"], "width -64|height"), (["--size", "64x63"], "nearest is 64"), (["--size", "1e2"], "not WxH"),
    (["--size", "64x64x64"], "not WxH"), (["--size", ""], "not WxH"), (["--size", "9" * 30], "nearest"),
    (["--nfe", "0"], "nfe"), (["--nfe", "101"], "nfe"), (["--nfe", "1.5"], "invalid int"),
    (["--nfe", "9", "--mode", "few"], "1..8"), (["--mode", "best"], "'best' is none of few, any, multi"),
    (["--num-images", "0"], "num_images"), (["--num-images", "1000000000"], "at most 10000"),
    (["--num-images", "-3"], "num_images"), (["--dtype", "int7"], "dtype"), (["--precision", "int3"], "precision"),
    (["--device", "tpu"], "device"), (["--device", "cuda:64"], "absent"),
    (["--device", "cuda:-5"], "not a device|absent"), (["--lora", "nowhere.safetensors"], "does not exist"),
    (["--lora", "file"], "truncated or no safetensors"), (["--lora", "pickle.bin"], "can run code"),
    (["--lora", "empty"], "holds no adapter"), (["--lora", "file:nan"], "finite"), (["--lora", "file:inf"], "finite"),
    (["--lora", "huge.safetensors"], "header of 26,214,401 bytes"), (["-o", "folder.png"], "that is a folder"),
    (["-o", "no/such/out.png"], "does not exist; create it"), (["-o", "file/out.png"], "cannot be written"),
    (["-o", "out.exe"], "must end in"), (["-o", ""], "must end in"), (["-o", "x" * 300 + ".png"], "cannot be written"),
    (["-o", "a\0b.png"], "cannot be written"), (["-o", "x" * 250 + ".png", "--num-images", "200"], "cannot be written"),
    (["--model", "nowhere"], "does not exist"), (["--model", "file"], "single file"),
    (["--model", "empty"], "model_index"), (["--model", "hf://x"], "no model of the hub"),
    (["--model", "hf://x/y"], "not in the local cache"), (["--model", "a\0b"], "cannot be read"),
    (["--unknown"], "no option --unknown"),
]  # fmt: skip
OTHERS = [
    (["paint"], "'paint' is none of generate, "), (["generate"], "give prompts"),
    (["generate", "\udcff\udcfe", "--model", "demo"], "surrogate"), (["generate", "a" * 100_001], "at most 100,000"),
    (["inspect"], "inspect needs a model"), (["inspect", "nowhere"], "does not exist"),
    (["inspect", "file"], "single file"),
    (["inspect", "hf://a/b/../c"], "no model of the hub"), (["serve", "nowhere", "--port", "0"], "does not exist"),
    (["serve", "--port", "70000"], "from 0 to 65535"), (["serve", "--port", "x"], "invalid int"),
    (["serve", "--host", "no.such.host.invalid"], "no address"), (["serve", "--host", "x" * 300], "no address"),
    (["serve", "--host", "a\0b"], "no address"), (["serve", "--timeout", "nan"], "timeout must be"),
    (["serve", "--timeout", "0"], "--timeout must be"),
    (["serve", "--drain-timeout", "inf"], "drain_timeout must be"),
    (["serve", "--token-file", "nowhere"], "not readable"), (["serve", "--token-file", "folder.png"], "not readable"),
    (["serve", "--token-file", "binary.txt"], "not readable"),
    (["serve", "--token-file", "blank.txt"], "holds no token"),
    (["serve", "--token-env", "TWINFLOW_NO_SUCH"], "holds no token"), (["serve", "--max-batch", "0"], "max_batch"),
    (["serve", "--max-wait", "nan"], "max_wait"), (["serve", "--max-queue", "1"], "max_queue"),
    (["serve", "--nfe", "0", "--port", "0"], "nfe"),
    (["convert", "file", "out", "--base", "nowhere"], "does not exist"),
    (["convert", "file", "out", "--base", "empty"], "model_index.json is missing"), (["convert", "out"], "required"),
    (["bench", "show"], "one record"), (["bench", "show", "nowhere.json"], "does not exist"),
    (["bench", "show", "folder.png"], "cannot be read"), (["bench", "show", "deep.json"], "nested too deeply"),
    (["bench", "show", "file"], "lacks"), (["bench", "show", "binary.txt"], "not JSON"),
    (["bench", "compare", "file"], "two records"), (["bench", "compare", "file", "file"], "lacks"),
    (["bench", "demo", "demo"], "one model"), (["bench", "demo", "--batches", "0"], "1 or more"),
    (["bench", "demo", "--batches", "a"], "not a list"), (["bench", "--random-weights", "gpt"], "gpt"),
    (["bench", "demo", "--json", "no/such.json"], "does not exist; create"),
    (["bench", "demo", "--html", "empty"], "a folder"), (["bench", "demo", "--repeats", "0"], "repeats"),
    (["eval", "--nfe", "0", "--model", "nowhere"], "nfe"), (["sensitivity", "nowhere"], "does not exist"),
    (["kernels", "--nonsense"], "no option --nonsense"), (["batch", "demo", "nowhere.txt", "-o", "o"], "nowhere.txt"),
    (["batch", "demo", "folder.png", "-o", "o"], "must end in"), (["batch", "demo", "binary.txt", "-o", "o"], "UTF-8"),
    (["batch", "demo", "blank.txt", "-o", "o"], "no prompt"),
    (["batch", "demo", "rows.jsonl", "-o", "o"], "must be an integer"),
    (["batch", "demo", "deep.jsonl", "-o", "o"], "JSON"),
    (["batch", "demo", "blank.txt", "-o", "file/o"], "cannot be written"),
    (["batch", "demo", "rows.jsonl", "-o", "o", "--num-images", "0"], "num_images"),
]  # fmt: skip


def check(argv: list[str], message: str, desk: Path, capsys) -> None:
    before = listing(desk)
    code, out, err = run(argv, capsys)
    assert code == 2, (code, err)
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("twinflow-rt")
    assert re.search(message, err), err
    assert listing(desk) == before, "something was written"


@pytest.mark.parametrize(("options", "message"), GENERATE)
def test_generate(desk, source, capsys, options, message):
    check(["generate", "a red circle", "--model", str(source), "--device", "cpu", *options], message, desk, capsys)


@pytest.mark.parametrize(("argv", "message"), OTHERS)
def test_other_commands(desk, capsys, argv, message):
    check(argv, message, desk, capsys)


def test_file_names_that_are_no_unicode(desk, source, capsys):
    """Safetensors cannot open a folder of such a name, and a message can show it."""
    model = os.fsdecode(b"m\xff")
    (desk / model).symlink_to(source)
    check(["generate", "a", "--model", model, "--device", "cpu"], "only names that are UTF-8; rename it", desk, capsys)


def test_messages_are_cut(desk, source, capsys):
    """A megabyte of text in a file is not a megabyte on the terminal."""
    shutil.copytree(source, desk / "m")
    edit_json(desk / "m" / "model_index.json", _class_name="Edit" * 300_000)
    code, out, err = run(["inspect", "m"], capsys)
    assert code == 2 and out == "" and len(err) < 2100 and err.count("\n") == 1


def process(*argv: bytes | str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "twinflow_rt.cli", *argv], cwd=cwd, capture_output=True, timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip


def test_as_processes(desk, source):
    """The same through the real entry point, with bytes that no terminal shows."""
    done = process("generate", b"\xff\xfe", "--model", str(source), cwd=desk)
    assert done.returncode == 2 and done.stdout == b"" and done.stderr.count(b"\n") == 1 and b"surrogate" in done.stderr
    argv = "generate", "a", "--model", str(source), "--device", "cpu", "--size", "16", "-o", b"\xe9\xff.png"
    done = process(*argv, cwd=desk)
    assert done.returncode == 0 and done.stdout.startswith(b"wrote") and b"Traceback" not in done.stderr
    assert b"\xe9\xff.png" in os.listdir(os.fsencode(desk))
