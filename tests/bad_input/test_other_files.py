"""LoRA files, artifacts and their plans, conversions, records: what `test_folders` does to model folders."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.conftest import edit_json, refused
from tests.bad_input.tensors import BAD
from tests.factory import WEIGHTS
from twinflow_rt import cli
from twinflow_rt.bench import record
from twinflow_rt.convert import convert
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.loading import load

MODULE = "transformer.layers.0.attention.to_k"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"


def write_lora(path: Path, metadata: dict[str, str] | None = None, **changes: object) -> Path:
    tensors = {A: torch.ones(2, 48), B: torch.ones(48, 2), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata=metadata)
    return path


def header(config: str) -> dict[str, str]:
    return {"lora_adapter_metadata": config}


# -- LoRA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_lora_files(source, tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    refused(lambda: load(source, device="cpu", loras=[path]), message, CheckpointError)


def pair(name):
    return {f"{name}.lora_A.weight": torch.ones(2, 2), f"{name}.lora_B.weight": torch.ones(2, 2)}


LORAS = {
    "integers": ({A: torch.ones(2, 48).long()}, None, "stored as I64"),
    "bytes": ({B: torch.ones(48, 2).byte()}, None, "stored as U8"),
    "half a pair": ({B: None}, None, "lacks lora_B"),
    "a vector": ({A: torch.ones(48)}, None, "do not make"), "a scalar": ({A: torch.tensor(1.0)}, None, "do not make"),
    "rank 0": ({A: torch.ones(0, 48), B: torch.ones(48, 0)}, None, "do not make"),
    "other ranks": ({A: torch.ones(3, 48)}, None, "do not make"),
    "four axes": ({A: torch.ones(2, 48, 3, 1)}, None, "do not make"),
    "alpha NaN": ({f"{MODULE}.alpha": torch.tensor(float("nan"))}, None, "alpha"),
    "alpha of many": ({f"{MODULE}.alpha": torch.ones(100_000)}, None, r"of shape \(100000,\)"),
    "alpha true": ({f"{MODULE}.alpha": torch.tensor(True)}, None, "alpha"),
    "DoRA of others": ({f"{MODULE}.dora_scale": torch.ones(47, 1)}, None, "not one for each row"),
    "another model": (pair("x"), None, "adapts x"), "traversal": (pair("../../x"), None, "adapts"),
    "deep metadata": ({}, header('{"a":' * 100_000), "nested too deeply"),
    "metadata of a list": ({}, header("[1]"), "not readable JSON"),
    "metadata twice": ({}, header('{"a": 1, "a": 2}'), "stands twice"),
    "alpha of text": ({}, header('{"transformer.lora_alpha": "8"}'), "alpha"),
    "patterns of a list": ({}, header('{"transformer.alpha_pattern": [1]}'), "alpha_pattern"),
    "a pattern that backtracks": ({}, header('{"transformer.alpha_pattern": {"(a+)+$": 1}}'), "regular expression"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "metadata", "message"), LORAS.values(), ids=LORAS)
def test_loras(source, tmp_path, changes, metadata, message):
    path = write_lora(tmp_path / "a.safetensors", metadata, **changes)
    refused(lambda: load(source, device="cpu", loras=[path]), message, CheckpointError)


PEFT = ["[", "[]", '{"a": NaN}', '{"a":' * 100_000, '{"lora_alpha": []}', '{"alpha_pattern": 3}']


@pytest.mark.parametrize("content", PEFT)
def test_peft_configurations(source, tmp_path, content):
    write_lora(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(content)
    refused(lambda: load(source, device="cpu", loras=[tmp_path]), "JSON|alpha", CheckpointError)


# -- artifacts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    return pipe.save(tmp_path_factory.mktemp("artifact") / "a")


@pytest.fixture
def artifact(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "a")


def edit_plan(artifact: Path, **changes: object) -> None:
    plan = json.loads((artifact / "artifact.json").read_text())["plan"]
    edit_json(artifact / "artifact.json", plan={k: v for k, v in {**plan, **changes}.items() if v is not ...})


PLANS = [
    {"schema": 1}, {"schema": None}, {"schema": "3"}, {"schema": [3]}, {"surprise": 1}, {"family": ...}, {"family": 3},
    {"family": None}, {"dtype": "float33"}, {"dtype": "nn"}, {"dtype": "__class__"}, {"dtype": 16},
    {"precision": "int2"}, {"precision": 8}, {"schedule": []}, {"schedule": [[1.0]]}, {"schedule": [[1.0, 0.0, 0.0]]},
    {"schedule": [["1", "0"]]}, {"schedule": {}}, {"schedule": [[True, False]]}, {"schedule": None}, {"choices": [{}]},
    {"choices": [1]}, {"choices": [{"op": 1, "chosen": "a", "refused": []}]},
    {"choices": [{"op": "a", "chosen": "b", "refused": ["c"]}]}, {"loras": [{"name": "a"}]},
    {"loras": [{"name": "a", "weight": "1", "sha256": ""}]},
    {"stages": [{"name": "a", "flops": 1.5, "weight_bytes": 1}]}, {"layers": [3]}, {"notes": [1]}, {"notes": "text"},
    {"exempt": [1]}, {"exempt": "q"}, {"absorbed": 1}, {"absorbed": "no"}, {"folded": [1]}, {"folded": {"a": "b"}},
    {"parameters_before": "many"}, {"bytes_after": 1.5}, {"bytes_after": None}, {"device": 3}, {"source": {}},
]  # fmt: skip


@pytest.mark.parametrize("changes", PLANS, ids=str)
def test_plans(artifact, changes):
    edit_plan(artifact, **changes)
    text = refused(lambda: load(artifact, device="cpu"), "plan|schema", CheckpointError)
    assert "compile again" in text or "save it again" in text


MANIFESTS = {
    "no schema": ({"schema": ...}, "schema None"), "schema of text": ({"schema": "1"}, "schema '1'"),
    "another schema": ({"schema": 2}, "schema 2"), "no plan": ({"plan": ...}, "lacks plan"),
    "plan of a list": ({"plan": [1]}, "plan"), "no files": ({"files": {}}, "not part of the artifact"),
    "files of a list": ({"files": ["a"]}, "file list"), "files of nothing": ({"files": None}, "file list"),
    "source of a number": ({"source": 3}, "save it again"), "no sampler": ({"sampler": ...}, "lacks sampler"),
    "sampler of a list": ({"sampler": []}, "sampler"), "sampler of less": ({"sampler": {}}, "sampler lacks"),
    "deep": ({"sampler": {"a": {"b": {}}}}, "sampler lacks"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_manifests(artifact, changes, message):
    edit_json(artifact / "artifact.json", **changes)
    refused(lambda: load(artifact, device="cpu"), message, CheckpointError)


SAMPLERS = [
    {"sampling_steps": 0}, {"sampling_steps": "1"}, {"stochast_ratio": None}, {"mode": "x"}, {"rfba_gap_steps": [1]},
]  # fmt: skip


@pytest.mark.parametrize("change", SAMPLERS, ids=str)
def test_saved_samplers(artifact, change):
    sampler = json.loads((artifact / "artifact.json").read_text())["sampler"]
    edit_json(artifact / "artifact.json", sampler={**sampler, **change})
    refused(lambda: load(artifact, device="cpu"), next(iter(change)), CheckpointError)


NAMES = ["../outside", "/etc/passwd", "", ".", "vae", "vae/../artifact.json", "a\0b", "\ud800", "x" * 5000]


@pytest.mark.parametrize("name", NAMES)
def test_file_lists_that_name_others(artifact, name):
    """Nothing outside an artifact is hashed for it."""
    files = json.loads((artifact / "artifact.json").read_text())["files"]
    edit_json(artifact / "artifact.json", files={**files, name: "0" * 64})
    refused(lambda: load(artifact, device="cpu"), "not part of the artifact", CheckpointError)


@pytest.mark.parametrize("value", [None, 3, [], "", "0" * 64, "z" * 64, {}])
def test_hashes(artifact, value):
    files = json.loads((artifact / "artifact.json").read_text())["files"]
    edit_json(artifact / "artifact.json", files={**files, "model_index.json": value})
    refused(lambda: load(artifact, device="cpu"), "does not match the hash", CheckpointError)


def test_plans_of_another_network(artifact):
    """Well-formed and signed, but of three evaluations: the tables do not fit, and that is said."""
    edit_plan(artifact, schedule=[[1.0, 0.0], [0.5, 0.0], [0.25, 0.0]])
    refused(lambda: load(artifact, device="cpu"), "has shape", CheckpointError)


def test_tensors_of_another_network(artifact):
    path = artifact / "transformer" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v.flatten() for k, v in tensors.items()}, path)
    files = json.loads((artifact / "artifact.json").read_text())["files"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(artifact / "artifact.json", files={**files, "transformer/model.safetensors": digest})
    refused(lambda: load(artifact, device="cpu"), "has shape", CheckpointError)


# -- conversions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "message"), list(BAD.values())[::4], ids=list(BAD)[::4])
def test_files_to_convert(source, tmp_path, content, message):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    refused(lambda: convert([file], source, tmp_path / "out"), message, CheckpointError)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_bases_to_convert(source, model, tmp_path):
    file, out = source / "transformer" / WEIGHTS, tmp_path / "out"
    for target, message in ((model, "exists"), (tmp_path / ("x" * 300), "written"), (file / "x", "written")):
        refused(lambda target=target: convert([file], source, target), message, ConfigError)
    paths = {tmp_path / "none": "missing", source / "tokenizer": "no .safetensors", Path("a\0"): "cannot"}
    for files, message in (([path], message) for path, message in paths.items()):
        refused(lambda files=files: convert(files, source, out), message, CheckpointError)
    for kind, message in (({}, "kind|names no"), (["x"], "names no"), (None, "kind|names no"), ("x", "kind|families")):
        edit_json(model / "vae" / "config.json", _class_name=kind)
        refused(lambda: convert([file], model, out), message, CheckpointError)
    (model / "vae" / "secret.txt").symlink_to("/etc/passwd")
    refused(lambda: convert([file], model, out), "outside the model folder", CheckpointError)
    (model / "vae" / "secret.txt").unlink()
    (model / "vae" / "config.json").write_text("[" * 100_000)
    refused(lambda: convert([file], model, out), "nested too deeply", CheckpointError)
    assert not out.exists() and not list(tmp_path.glob(".*"))


# -- records and embeddings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff",
    b'{"schema": 1}', b'{"schema": 1, "schema": 1}', b'{"schema": NaN}']
)  # fmt: skip
def test_records(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    refused(lambda: record.load(path), "record.json", ConfigError)


@pytest.mark.parametrize("path", ["", "nowhere", "/", "a\0b", "x" * 5000])
def test_records_that_are_elsewhere(path):
    refused(lambda: record.load(path), "record", ConfigError)


@pytest.mark.parametrize(("content", "message"), list(BAD.values())[::3], ids=list(BAD)[::3])
def test_prompt_embeddings(pipe, tmp_path, content, message):
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(content)
    refused(lambda: pipe.read_embeds(path), message, CheckpointError)


def test_inspecting_what_is_no_model(tmp_path, capsys):
    for name in (".", "/", "/proc", "/dev"):
        assert cli.main(["inspect", name if name != "." else str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
