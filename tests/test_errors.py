"""The advice for packages that are absent: an extra from a checkout, or its packages, and never an index without us."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from twinflow_rt.errors import ConfigError, extra_missing

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_an_absent_extra_is_installed_from_a_checkout_or_package_by_package(monkeypatch):
    listed = ["torch>=2", 'matplotlib>=3.9; extra == "report"', "scipy>=1.11 ; extra == 'report'", 'ray>2;extra=="ray"']
    monkeypatch.setattr(metadata, "requires", lambda name: listed)
    error = extra_missing("plots need matplotlib", "report")
    assert isinstance(error, ConfigError) and str(error) == (
        "plots need matplotlib: pip install '.[report]' in a checkout of twinflow_rt, "
        "or anywhere: pip install 'matplotlib>=3.9' 'scipy>=1.11'"
    )


def test_run_from_a_checkout_that_is_not_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert str(extra_missing("x", "ray")) == "x: pip install '.[ray]' in a checkout of twinflow_rt"


@pytest.mark.parametrize("folder", ["twinflow_rt", "docs", "tests"])
def test_no_text_names_an_index_that_has_no_twinflow_rt(folder):
    texts = {path: path.read_text() for end in ("py", "md", "html") for path in (ROOT / folder).rglob(f"*.{end}")}
    texts.pop(Path(__file__), None)
    assert not [path for path, text in texts.items() if "twinflow-rt" + "[" in text]
    named = {name for text in texts.values() for name in re.findall(r'extra_missing\(.+, "(\w+)"\)', text)}
    assert named <= {*EXTRAS} and (named or folder != "twinflow_rt")
