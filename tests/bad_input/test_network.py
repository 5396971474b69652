"""No network unless asked: loading and generating open no socket, whatever the environment says of the hub."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import twinflow_rt
from tests.bad_input.conftest import refused
from twinflow_rt import cli
from twinflow_rt.loading import load
from twinflow_rt.planning.description import describe


@pytest.fixture
def no_sockets(monkeypatch):
    def opened(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, opened)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def test_loading_and_generating(source, tmp_path, no_sockets):
    pipe = load(source, device="cpu")
    pipe("a", height=16, width=16, seed=0)
    saved = pipe.save(tmp_path / "saved")
    assert load(saved, device="cpu")("a", height=16, width=16, seed=0).seeds == [0]
    assert describe(source).parts


def test_the_command_line(source, tmp_path, monkeypatch, no_sockets):
    argv = ["generate", "a", "--model", str(source), "--device", "cpu", "--size", "16", "-o", str(tmp_path / "a.png")]
    assert cli.main(argv) == 0 and cli.main(["inspect", str(source)]) == 0


@pytest.mark.parametrize("name", ["hf://owner/name", "hf://owner/name@v1/inner"])
def test_names_of_the_hub_look_into_the_cache_only(no_sockets, name):
    refused(lambda: load(name, device="cpu"), r"not in the local cache; fetch it with load\(..., download=True\)")


def calls(tree: ast.AST, *names: str) -> list[ast.Call]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in names]


def test_no_pickle_and_no_code_of_others():
    """The package unpickles in training alone, its own checkpoints, and tensors only; it runs no file of a model."""
    root = Path(twinflow_rt.__file__).parent
    for path in root.rglob("*.py"):
        tree, name = ast.parse(path.read_text()), str(path.relative_to(root))
        imported = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        assert not imported & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, name
        assert not calls(tree, "eval", "exec", "np.load", "numpy.load", "torch.hub.load"), name
        for call in calls(tree, "torch.load"):
            safe = [k for k in call.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            assert safe and name.startswith("training/"), name


SCRIPT = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append((event, args)) if event.startswith("socket.") else None)
import twinflow_rt
pipe = twinflow_rt.load(sys.argv[1], device="cpu")
pipe("a", height=16, width=16, seed=0)
heavy = [m for m in ("huggingface_hub", "requests", "httpx", "transformers", "diffusers") if m in sys.modules]
assert not opened and not heavy, (opened, heavy)
"""


def test_a_process_of_its_own(source):
    """The interpreter's own record of sockets; and the hub's client is not even imported."""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(source)], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
