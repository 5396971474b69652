"""Saved programs: a model folder whose transformer is already compiled.

    artifact.json      schema, sampler, plan, hash of the source weights, hash of every file
    transformer/       config.json, safetensors: fused weights and folded tables, under module names
    text_encoder/ vae/ the parts inference uses, under checkpoint names
    tokenizer/ scheduler/ model_index.json   as in the source

The folder is written under another name and renamed when complete; artifact.json is its last file and
every other file's SHA-256 stands in it, so neither half an artifact nor a changed one will load.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..sampling.schedule import SamplerConfig
from .atomic import check_target, new_folder
from .checkpoint import Checkpoint
from .files import read_json, some
from .shards import write_shards
from .typed_json import typed
from .versions import refusal

SCHEMA = 1
MANIFEST = "artifact.json"
FIELDS = ("schema", "sampler", "source", "plan", "files")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_place(folder: Path) -> None:
    """Raise CheckpointError if something stands at `folder` already, ConfigError if nothing can be written there."""
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder} exists; artifacts are not overwritten: choose another name or remove it")
    check_target(folder, "the artifact's folder", make_parents=True)


def write(
    folder: Path, parts: Mapping[str, tuple[dict[str, Any], Mapping[str, Tensor]]], source: Path, meta: dict[str, Any]
) -> Path:  # fmt: skip
    """Write an artifact of `parts` (subfolder -> (config.json's content, tensors)) and `meta`.

    source: the model folder it was compiled from; its tokenizers are copied. Raises CheckpointError
    if something stands at `folder` already: artifacts are never changed.
    """
    check_place(folder)
    with new_folder(folder) as partial:
        for name, (config, tensors) in parts.items():
            (partial / name).mkdir()
            said = {key: value for key, value in config.items() if key != "quantization_config"}  # of the files read
            (partial / name / "config.json").write_text(json.dumps(said, indent=1))
            _write_tensors(partial / name, tensors)
        for part in sorted((*source.glob("tokenizer*/"), *source.glob("scheduler/"))):
            shutil.copytree(part, partial / part.name)
        shutil.copy(source / "model_index.json", partial / "model_index.json")
        files = {str(p.relative_to(partial)): sha256(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        manifest = {"schema": SCHEMA, **meta, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return folder


def read(folder: Path) -> dict[str, Any]:
    """Return the verified manifest of an artifact, `sampler` as a SamplerConfig, `plan` as the file has it.

    Raises CheckpointError for another schema, a field that is not what it should be, a missing or
    additional file, or a changed one.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(refusal(folder / MANIFEST, manifest.get("schema"), SCHEMA, "save it again"))
    absent = [field for field in FIELDS if field not in manifest]
    if absent or not isinstance(manifest["files"], dict) or not isinstance(manifest["source"], str):
        raise CheckpointError(f"{folder / MANIFEST} lacks {', '.join(absent) or 'a file list'}; save it again")
    try:
        if isinstance(said := manifest["sampler"], dict):
            said = {"times": None, "network_times": None, "solver": "euler", **said}  # which older ones lack
        sampler = typed(said, SamplerConfig, "sampler")
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}; save it again") from None
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if strangers := sorted(present ^ set(manifest["files"])):
        raise CheckpointError(f"{folder}: {some(strangers)} missing or not part of the artifact; save it again")
    for name, expected in manifest["files"].items():
        if sha256(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name} does not match the hash in {MANIFEST}; it was changed or damaged: save it again"
            )
    return {**manifest, "sampler": sampler}


def is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the weights of one network; only one file's tensors are on the host at a time."""

    def read(names: list[str]) -> dict[str, Tensor]:
        return {name: tensors[name].detach().cpu() for name in names}

    write_shards(folder, "model", {name: tensor.nbytes for name, tensor in tensors.items()}, read)


def source_hash(network: Checkpoint) -> str:
    """Return the SHA-256 over the names and contents of a network's weight files, in order.

    Of an artifact's network it is that of the files it was compiled from.
    """
    if is_artifact(network.folder.parent):
        return str(read_json(network.folder.parent / MANIFEST)["source"])
    digest = hashlib.sha256()
    for path in network.paths:
        digest.update(path.name.encode())
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()
