"""What type checkers and editors see of the package: its own types, and misspelt names."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import twinflow_rt

ROOT = Path(__file__).parents[2]
READ = (
    "twinflow_rt", "twinflow_rt.loading", "twinflow_rt.options", "twinflow_rt.pipeline", "twinflow_rt.config",
    "twinflow_rt.errors", "twinflow_rt.runtime.host_state", "twinflow_rt.runtime.out_of_memory",
    "twinflow_rt.sampling.schedule", "twinflow_rt.stages.result", "twinflow_rt.stages.text",
)  # fmt: skip
USE = """\
import twinflow_rt
pipe = twinflow_rt.load("demo", device="cpu")
reveal_type(pipe)
reveal_type(pipe("a", seed=0))
reveal_type(twinflow_rt.SamplerConfig(2))
twinflow_rt.load("demo", devcie="cpu")
pipe("a", hieght=16)
pipe.sav("x")
twinflow_rt.lode
"""


def test_mypy_knows_what_load_returns_and_refuses_what_is_misspelt(tmp_path):
    """Only the modules that have these types, and those of their decorators, are read (READ): seconds instead of a
    minute."""
    (tmp_path / "use.py").write_text(USE)
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nfollow_imports = skip\n[mypy-{','.join(READ)}]\nfollow_imports = silent\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache"]
    command += [tmp_path / "use.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    found = re.findall(r"use\.py:(\d+): (?:note|error): (.*)", done.stdout)
    lines = {int(number): text for number, text in reversed(found)}
    for number, text in {
        3: "twinflow_rt.pipeline.Pipeline", 4: "twinflow_rt.stages.result.Result", 5: "schedule.SamplerConfig",
        6: 'Unexpected keyword argument "devcie"', 7: 'Unexpected keyword argument "hieght"',
        8: '"Pipeline" has no attribute "sav"', 9: 'Module has no attribute "lode"',
    }.items():  # fmt: skip
        assert text in lines.get(number, ""), done.stdout + done.stderr


def test_pyright_knows_the_same(tmp_path):
    """By basedpyright, which comes with all it needs (extra `lint`; too large for the tests' own)."""
    checker = Path(sys.executable).with_name("basedpyright")
    if not checker.exists():
        pytest.skip("basedpyright is not installed")
    (tmp_path / "use.py").write_text(USE)
    command = [checker, "--outputjson", "--pythonpath", sys.executable, tmp_path / "use.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = {item["range"]["start"]["line"] + 1: item["message"] for item in found}
    for number, text in {
        3: 'is "Pipeline"', 4: 'is "Result"', 5: 'is "SamplerConfig"', 6: 'No parameter named "devcie"',
        7: 'No parameter named "hieght"', 8: 'Cannot access attribute "sav"', 9: '"lode" is not a known attribute',
    }.items():  # fmt: skip
        assert text in lines.get(number, ""), done.stdout + done.stderr


def test_the_stub_names_what_the_package_exports():
    stub = ast.parse((ROOT / "twinflow_rt" / "__init__.pyi").read_text())
    named = {
        alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # fmt: skip
    assert named == twinflow_rt._PUBLIC


def test_types_are_shipped():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["twinflow_rt"]
    for name in ("py.typed", "__init__.pyi"):
        assert (ROOT / "twinflow_rt" / name).is_file() and any(Path(name).match(pattern) for pattern in data)
        assert any(Path("twinflow_rt", name).match(word) for word in (ROOT / "MANIFEST.in").read_text().split())
