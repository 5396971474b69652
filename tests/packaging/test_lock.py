"""requirements/test.lock against pyproject.toml: what is asked for is pinned, within its range, with hashes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def _locked() -> dict[str, str]:
    text = (ROOT / "requirements" / "test.lock").read_text()
    pins = re.findall(r"^([\w.-]+)==([\w.!+-]+)[^\n]*\\\n +--hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(pins) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE)), "a pin without a hash"
    return {canonicalize_name(name): version for name, version in pins}


def test_the_lock_has_what_the_tests_ask_for():
    project, locked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], _locked()
    asked = map(Requirement, (*project["dependencies"], *project["optional-dependencies"]["test"]))
    wanted = {canonicalize_name(r.name): r.specifier for r in asked}
    del wanted["torch"]  # a CPU or a CUDA build: the Makefile's TORCH
    assert not wanted.keys() - locked.keys(), "make lock"
    assert not [name for name, versions in wanted.items() if locked[name] not in versions], "make lock"


def test_no_lock_names_a_machine():
    text = (ROOT / "requirements" / "test.lock").read_text()
    assert not re.search(r"file:|--find-links|--index-url|\+cpu|\+cu\d", text)
