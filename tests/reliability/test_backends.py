"""Optional backends that do not import: named with the reason, passed over, and without effect on results."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from twinflow_rt.cli import kernels as inventory
from twinflow_rt.ops import Target, optional, select

BREAKS = {
    "ImportError": "raise ImportError('libcudart.so.11: cannot open shared object file')",
    "OSError": "raise OSError('libtorch_cuda.so: undefined symbol: _ZN2at4_ops')",
    "RuntimeError": "raise RuntimeError('built for torch 1.0')", "AttributeError": "import torch; torch.no_such_name",
    "SyntaxError": "def broken(:", "ModuleNotFoundError": "import a_dependency_of_it",
}  # fmt: skip
MODULES = {"flash_attn": "flash-attn-2", "xformers.ops": "xformers"}
SCRIPT = """
import hashlib, json, sys
import twinflow_rt
pipe = twinflow_rt.load("demo", device="cpu")
image = pipe("a red circle", seed=1, height=32, width=32, output="np").images
assert not {"flash_attn", "xformers"} & set(sys.modules)
print(json.dumps([hashlib.sha256(image.tobytes()).hexdigest(), [c.chosen for c in pipe.plan.choices]]))
"""


@pytest.fixture(params=BREAKS)
def broken(request, tmp_path, monkeypatch):
    for package in ("flash_attn", "xformers"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(BREAKS[request.param])
        for loaded in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, loaded)  # of another test
    monkeypatch.syspath_prepend(tmp_path)
    optional.find.cache_clear()
    yield request.param
    optional.find.cache_clear()


def test_named_with_the_reason(broken, capsys):
    from twinflow_rt.cli import main

    assert main(["kernels", "--json", "--device", "cuda", "--head-dim", "64"]) == 0
    report = json.loads(capsys.readouterr().out)
    state = {p["module"]: p for p in report["packages"]}
    for module, name in MODULES.items():
        reason = state[module]["problem"]
        assert state[module]["broken"] and "installed but broken" in reason
        assert (broken if broken != "ModuleNotFoundError" else "needs a_dependency_of_it") in reason
        (row,) = (r for r in report["ops"] if (r["op"], r["name"]) == ("attention", name))
        assert not row["chosen"] and "installed but broken" in row["reason"]


def test_passed_over_by_name(broken):
    """The choice is what it is without the package, and the plan tells why it is not the package."""
    target = Target("cuda", torch.bfloat16, arch=80, head_dim=64)
    rows = {r.name: r for r in inventory.inventory(target) if r.op == "attention"}
    assert not any(rows[name].chosen for name in MODULES.values())
    (choice,) = (c for c in select(target)[1] if c.op == "attention")
    refused = dict(choice.refused)
    ranked = [name for name in MODULES.values() if rows[name].rank is not None]
    assert ranked and all("installed but broken" in refused[name] for name in ranked)


def test_results_do_not_change(tmp_path):
    (tmp_path / "flash_attn.py").write_text(BREAKS["OSError"])
    (tmp_path / "xformers.py").write_text(BREAKS["OSError"])
    outputs = set()
    for path in ("", str(tmp_path)):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((path, os.getcwd()))}
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
