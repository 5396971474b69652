"""The check that a folder is a whole text-to-image model in diffusers' layout."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError
from .files import WEIGHTS, check_tree, file_type, is_folder, read_json

IMAGE_TASKS = ("Edit", "ControlNet", "Layered", "Kontext")  # in names of pipelines


def model_folder(path: Path) -> Path:
    """Return `path` if it is a whole text-to-image model: model_index.json and its four parts.

    Raises CheckpointError saying what it is otherwise, or what is missing.
    """
    if not file_type(path):
        raise CheckpointError(
            f"{path} does not exist; give a local model folder, 'demo', or hf://owner/name (docs/reliability.md)"
        )
    if not is_folder(path):
        raise CheckpointError(f"{path} is a single file; say with base= (--base) which model folder it belongs to")
    if not os.path.lexists(path / "model_index.json"):  # before a whole disk is walked
        raise CheckpointError(
            f"{path / 'model_index.json'} is missing; a model folder has the layout diffusers saves, and the "
            "weights of one network alone go with base= (--base), the folder of their model"
        )
    check_tree(path)
    pipeline = str(read_json(path / "model_index.json").get("_class_name", ""))
    if any(task in pipeline for task in IMAGE_TASKS):
        raise CheckpointError(
            f"{path} is a {pipeline}, which takes images as input; supported is generation from text, and "
            "from a picture by noise (docs/editing.md says what more it would take)"
        )
    for part in ("transformer", "text_encoder", "tokenizer", "vae"):
        if not is_folder(path / part):
            raise CheckpointError(f"{path} has no {part}/ folder; the download is incomplete")
    return path


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in the parts of a model folder."""
    return [path for path in folder.glob("*/*") if path.suffix.lower() in WEIGHTS]
