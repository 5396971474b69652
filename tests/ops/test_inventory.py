"""`twinflow-rt kernels`: complete, honest about broken packages, and the same as what selection does."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from twinflow_rt.cli import kernels as inventory
from twinflow_rt.cli import main
from twinflow_rt.ops import Target, optional, select
from twinflow_rt.ops.implementations import IMPLEMENTATIONS
from twinflow_rt.ops.selection import select_quantized


@pytest.fixture
def broken_flash_attention(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10 [sic]')")
    monkeypatch.syspath_prepend(tmp_path)
    optional.find.cache_clear()
    yield
    optional.find.cache_clear()


def test_lists_every_implementation_and_agrees_with_selection():
    for target in (Target("cpu", torch.float32), Target("cuda", torch.bfloat16, arch=90, head_dim=128)):
        rows, choices = inventory.inventory(target), [*select(target)[1], *select_quantized(target)[1]]
        choices += [c for c in select(replace(target, fp8_attention=True))[1] if c.op == "attention_fp8"]
        assert {(r.op, r.name) for r in rows} == {(op, name) for op, some in IMPLEMENTATIONS.items() for name in some}
        assert {r.op: r.name for r in rows if r.chosen} == {c.op: c.chosen for c in choices}
        for row in (r for r in rows if r.chosen):
            better = [r for r in rows if r.op == row.op and r.rank is not None and r.rank < row.rank]
            assert row.reason is None and all(r.reason for r in better)


def test_json(capsys, broken_flash_attention):
    assert main(["kernels", "--json", "--device", "cuda", "--head-dim", "64"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["torch"] == torch.__version__
    assert report["target"]["dtype"] == "bfloat16" and report["target"]["head_dim"] == 64
    state = {p["module"]: p for p in report["packages"]}
    assert state["flash_attn"]["broken"] and "undefined symbol" in state["flash_attn"]["problem"]
    assert state["flash_attn.cute"]["broken"]  # its parent is what fails
    (row,) = (r for r in report["ops"] if (r["op"], r["name"]) == ("attention", "flash-attn-2"))
    assert "installed but broken" in row["reason"] and not row["chosen"]


def test_table(capsys, broken_flash_attention):
    assert main(["kernels"]) == 0
    out = capsys.readouterr().out
    assert "installed but broken: ImportError: undefined symbol: _ZN3c10 [sic]" in " ".join(out.split())
    assert all(op in out for op in IMPLEMENTATIONS) and "chosen" in out


@pytest.mark.parametrize(
    "arguments, message",
    [(["--device", "warp"], "warp"), (["--dtype", "int3"], "use float32"), (["--head-dim", "0"], "1 or more")],
)
def test_refusals(capsys, arguments, message):
    assert main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err
