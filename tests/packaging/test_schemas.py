"""Every sort of file that is written and read again states its schema; one from a newer version is refused as that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benches import score_plot as plot
from twinflow_rt.bench import record, schema
from twinflow_rt.checkpoint import artifact
from twinflow_rt.checkpoint.versions import refusal
from twinflow_rt.errors import TwinFlowError
from twinflow_rt.export import archive
from twinflow_rt.plan import SCHEMA as PLAN_SCHEMA
from twinflow_rt.plan import Plan
from twinflow_rt.planning import precision
from twinflow_rt.stages import embeds_file


def _json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def _artifact(folder: Path, number: int) -> object:
    _json(folder / artifact.MANIFEST, {"schema": number})
    return artifact.read(folder)


def _embeds(folder: Path, number: int) -> object:
    path = folder / "prompts.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"format": embeds_file.FORMAT, "version": str(number)})
    return embeds_file.read(path)


def _report(folder: Path, number: int) -> object:
    return plot.read([("name", _json(folder / "e.json", {"schema": number, "rows": []}))])


READERS = {
    "plan": (PLAN_SCHEMA, lambda folder, n: Plan.from_dict({"schema": n})),
    "artifact": (artifact.SCHEMA, _artifact),
    "bench record": (schema.VERSION, lambda folder, n: record.load(_json(folder / "r.json", _record(n)))),
    "eval report": (plot.SCHEMA, _report),
    "sensitivities": (precision.SCHEMA, lambda folder, n: precision.read(_json(folder / "s.json", {"schema": n}))),
    "prompt embeddings": (int(embeds_file.VERSION), _embeds),
    "exported model": (archive.FORMAT, lambda folder, n: archive._checked({"format": n}, folder / "model.twinflow")),
}


def _record(number: int) -> dict[str, object]:
    """The shipped record, stating another schema."""
    path = Path(__file__).parents[2] / "benches" / "records" / "demo-cpu.json"
    return {**json.loads(path.read_text()), "schema": number}


@pytest.mark.parametrize("sort", READERS)
def test_a_newer_file_is_refused_by_that_name(sort, tmp_path):
    current, read = READERS[sort]
    with pytest.raises(TwinFlowError, match=rf"has schema {current + 1}, newer than this version.*upgrade twinflow_rt"):
        read(tmp_path, current + 1)


@pytest.mark.parametrize("sort", READERS)
def test_an_older_file_is_made_again(sort, tmp_path):
    current, read = READERS[sort]
    with pytest.raises(TwinFlowError, match=rf"has schema {current - 1}, which reads {current}: .*again"):
        read(tmp_path, current - 1)


@pytest.mark.parametrize("found", [None, True, "2", [2], 1.5, "x" * 1000])
def test_what_is_no_number_is_not_newer(found):
    text = refusal("file", found, 1, "make it again")
    assert "newer" not in text and text.endswith("make it again") and len(text) < 120
