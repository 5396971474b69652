"""The GPU kit on the CPU: what it runs, what it keeps of a part that fails, hangs or lacks a tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benches.gpu import build, kernels, kit, report
from benches.ops.case import SIZES
from benches.ops.layer_cases import LAYERS
from benches.ops.op_cases import cases
from twinflow_rt.ops import EAGER


def script(name, code, **options):
    return kit.Part(name, ((sys.executable, "-c", code),), **options)


def test_a_part_leaves_its_log_whatever_becomes_of_it(tmp_path):
    ok = kit.run(script("good", "print('hello')"), tmp_path)
    bad = kit.run(script("bad", "import sys; print('so far', flush=True); sys.exit(3)"), tmp_path)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    slow = kit.run(script("slow", f"print('begun', flush=True); {child}"), tmp_path, limit_s=1)
    skipped = kit.run(script("absent", "", needs="a-tool-nobody-has"), tmp_path)
    assert (ok.status, ok.reason) == ("ok", None) and "hello" in (tmp_path / "good.log").read_text()
    assert bad.status == "failed" and "3" in bad.reason and "so far" in (tmp_path / "bad.log").read_text()
    assert slow.status == "timeout" and slow.seconds < 20 and "begun" in (tmp_path / "slow.log").read_text()
    assert skipped.status == "skipped" and "a-tool-nobody-has" in skipped.reason


def test_parts():
    for dry in (False, True):
        names = [part.name for part in kit.parts(Path("out"), dry)]
        assert names == [
            "build", "env", "checks", "tests", "tests-compile", "sanitizer",
            "kernels-z-image", "layers-z-image", "rows-z-image", "kernels-qwen-image", "layers-qwen-image",
            "rows-qwen-image", "z-image", "sd3.5-m", "sana", "qwen-image", "z-image-fp8", "qwen-image-fp8",
            "z-image-int4", "qwen-image-int4", "report",
        ]  # fmt: skip
        words = {word for part in kit.parts(Path("out"), dry) for command in part.commands for word in command}
        assert ("cuda" in words, "cpu" in words, "--dry" in words) == (not dry, dry, dry)
    assert kit.LIMIT_S < 8 * 60


def test_from_the_command_line(tmp_path, monkeypatch):
    """Build, facts and report by way of the script; unknown parts are named; records accumulate."""
    monkeypatch.setenv("PYTHON", sys.executable)
    command = ["sh", str(kit.ROOT / "benches" / "gpu.sh"), str(tmp_path), "--dry"]
    sh = lambda *parts: subprocess.run([*command, *parts], capture_output=True, text=True, check=False)
    assert "no part nonsense; there are build, env" in sh("nonsense").stderr
    done = sh("build", "report")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "kit.json").read_text())
    assert {name: outcome["status"] for name, outcome in record.items()} == {"build": "ok", "report": "ok"}
    assert "build" in (tmp_path / "report.txt").read_text()
    assert "kit" in json.loads((tmp_path / "report.json").read_text())


def test_the_linked_package_is_complete(tmp_path):
    package = build.link(tmp_path)
    build.link(tmp_path)  # a second time over what is there
    for name in ("__init__.py", "ops", "kernels/norm.py", "families.py"):
        assert (package / name).exists()
    target = tmp_path / "target"
    assert build.stale(target, [])
    target.write_text("")
    assert not build.stale(target, [Path(build.__file__)]) and build._pybind11() is not None


def test_a_wrong_kernel_is_reported_and_not_timed():
    case = next(c for c in cases(SIZES["tiny"], torch.float32, "cpu") if c.name == "swiglu")
    good = EAGER.swiglu

    def broken(x):
        raise RuntimeError("no kernel image\nis available")

    right, wrong = kernels.check(case, {"good": good, "off": lambda x: good(x) + 1, "broken": broken})
    assert list(right) == ["good"] and "off by" in wrong["off"]
    assert wrong["broken"] == "RuntimeError: no kernel image"


def test_kernels_records_and_reports(tmp_path, capsys):
    out = tmp_path / "kernels-z-image.json"
    options = ["--device", "cpu", "--sizes", "tiny", "--dtypes", "bfloat16"]
    ops = ["--ops", "rms_norm", "attention", "swiglu_quantized"]
    assert kernels.main([str(out), *options, *ops, "--repeats", "3", "--without", "compile"]) == 0
    record = json.loads(out.read_text())
    first = record["cases"][0]
    assert [c["case"] for c in record["cases"]] == [
        "rms_norm", "attention", "attention, ragged", "swiglu_quantized, float8", "swiglu_quantized, int8",
    ]  # fmt: skip
    assert first["chosen"] == "native" and set(first["times"]) == {"native", "eager", "torch"} == set(first["right"])
    rate = first["bytes"] / first["times"]["native"]["median"]
    assert first["achieved"]["native"]["bytes_per_s"] == pytest.approx(rate)
    assert "NVIDIA" in first["refused"]["cuda"] and not first["wrong"]
    assert report.main(str(tmp_path)) == 0
    text = (tmp_path / "report.txt").read_text()
    assert "rms_norm" in text and "native" in text


def test_layers_meet_their_rivals(tmp_path):
    out = tmp_path / "layers-z-image.json"
    options = ["--device", "cpu", "--sizes", "tiny", "--dtypes", "float32", "--kinds", "layers", "--repeats", "2"]
    assert kernels.main([str(out), *options, "--without", "compile"]) == 0
    record = {c["case"]: c for c in json.loads(out.read_text())["cases"]}
    assert set(record) == set(LAYERS) and not any(c["wrong"] for c in record.values())
    assert set(record["upsample_conv"]["times"]) == {"folded", "eager", "torch"}  # whose kernel is unfolded again
    assert "not slower than torch's own" in record["group_norm_silu"]["targets"]


def test_targets():
    case = next(c for c in cases(SIZES["tiny"], torch.float32, "cpu") if c.name == "rms_norm")
    times = {"cuda": {"median": 1.0}, "compile": {"median": 0.9}, "eager": {"median": 3.0}}
    met = kernels.verdict(case, times, {"cuda": {"share": 0.81}}, ["cuda"], "cuda")
    assert met == {"80 % of copy bandwidth": True, "not slower than torch.compile": False}
    case = next(c for c in cases(SIZES["tiny"], torch.float32, "cpu") if c.name == "attention")
    times = {"triton": {"median": 1.1}, "cudnn": {"median": 1.0}}
    (value,) = kernels.verdict(case, times, {"triton": {}}, ["triton", "cudnn"], "triton").values()
    assert value is False
    assert kernels.verdict(case, {}, {}, [], "triton") == {}


def test_unreadable_records_are_kept_out(tmp_path):
    (tmp_path / "kernels-z-image.json").write_text('{"cases": [')
    found = report.collect(tmp_path)
    assert "unreadable" in found["kernels-z-image"]
    assert report.main(str(tmp_path)) == 0
