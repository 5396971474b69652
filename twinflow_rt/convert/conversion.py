"""The conversion itself: files are recognised, accounted for key by key, and written beside what the base has."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from pathlib import Path

from ..checkpoint.atomic import check_target
from ..checkpoint.files import check_tree, is_folder
from ..errors import CheckpointError, ConfigError
from ..loading import model_path
from ..planning.description import describe
from ..runtime.host_state import isolated
from ..single_files.recognition import recognise
from .files import write_folder
from .report import Conversion


@isolated()
def convert(files: Sequence[Path], base: Path, target: Path, *, dry_run: bool = False) -> Conversion:
    """Write `target`, the model of `base` with the networks found in `files` in place of its own.

    files: safetensors files, or folders of them. base: a path, or another name of a model that `load` takes. dry_run:
    only say what would be written, keys unknown or missing included. Raises CheckpointError for files that are not this
    model's, ConfigError if `target` exists.
    """
    base = model_path(base)
    if not is_folder(base) or not (base / "model_index.json").is_file():
        raise CheckpointError(f"{base} is no model folder in diffusers' layout (it needs model_index.json)")
    check_tree(base)
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists; choose another name or remove it")
    check_target(target, "the folder to write", make_parents=True)
    found = recognise(files, base)
    networks, reports = {network.slot.name: network for network, _ in found}, tuple(report for _, report in found)
    copied = [path for path in sorted(base.rglob("*")) if path.is_file() and _stays(path.relative_to(base), networks)]
    names = sorted({p.relative_to(base).parts[0] for p in copied})
    result = Conversion(str(base), str(target), reports, tuple(names))
    if dry_run:
        return result
    result.require_complete()
    # describe makes all the checks that loading makes, but for reading the weights
    write_folder(target, base, copied, networks, describe)
    return result


def _stays(path: Path, replaced: Container[str]) -> bool:
    """Return whether a file of the base is taken: all but weights and indices of the networks that are replaced."""
    part = path.parts[0]
    return not part.startswith(".") and (part not in replaced or path.name == "config.json")
