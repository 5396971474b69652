"""Whole tiny models to damage, and what every refusal must be."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.factory import make_model
from twinflow_rt.errors import TwinFlowError
from twinflow_rt.loading import load

# a message ends in what to do, or names what is allowed
REMEDY = re.compile(
    r"download|give|use |choose|make |write|check|remov|convert|save it|compile again|put |shorten|replace|pass |take "
    r"|load |measure|create|keep |fetch|generate|need|must be|at most|supported|expected|name |nearest|asks for|change "
    r"|only |belongs? to|missing|get the|for another|incomplete|lacks|upgrade"
)


def refused(call: Callable[[], Any], message: str, kind: type[Exception] = TwinFlowError) -> str:
    """The one line that `call` is refused with: a named error that says what is wrong and what to do."""
    with pytest.raises(kind, match=message) as caught:
        call()
    text = str(caught.value)
    assert isinstance(caught.value, TwinFlowError), "not of the errors.py tree"
    assert "\n" not in text and len(text) < 2000 and REMEDY.search(text), text
    return text


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of a JSON file; `...` removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A good model; not to be changed."""
    return make_model(tmp_path_factory.mktemp("bad-input") / "m")


@pytest.fixture
def model(source, tmp_path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(source, tmp_path / "m")


@pytest.fixture(scope="session")
def pipe(source):
    return load(source, device="cpu")
