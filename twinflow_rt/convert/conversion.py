"""The conversion itself: files are recognised, accounted for key by key, and written beside what the base has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import check_target, new_folder, write_json
from ..checkpoint.files import read_json
from ..checkpoint.model_folder import model_folder
from ..checkpoint.shards import write_shards
from ..errors import ConfigError
from ..loading import model_path
from ..planning.description import describe
from ..runtime.host_state import isolated
from ..single_files.networks import Converted
from ..single_files.recognition import PartReport, recognise


@dataclass(frozen=True)
class Conversion:
    """Everything a conversion did or would do. copied: folders and files taken from the base."""

    base: str
    target: str
    parts: tuple[PartReport, ...]
    copied: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, every key with its action."""
        parts = [
            {**asdict(p), "keys": [{"source": k.source, "action": k.action, "targets": k.targets} for k in p.keys]}
            for p in self.parts
        ]
        return {"base": self.base, "target": self.target, "parts": parts, "copied": list(self.copied)}

    def __str__(self) -> str:
        return "\n".join([*map(str, self.parts), f"from {self.base}: {', '.join(self.copied)}"])

    def require_complete(self) -> None:
        """Raises CheckpointError if a key is unknown or missing."""
        for part in self.parts:
            part.require_complete()


@isolated()
def convert(files: Sequence[Path], base: Path, target: Path, *, dry_run: bool = False) -> Conversion:
    """Write `target`, the model of `base` with the networks found in `files` in place of its own.

    files: of weights, or folders of them. base: a path, or another name of a model that `load` takes. dry_run:
    only say what would be written, keys unknown or missing included. Raises CheckpointError for files that are not this
    model's, ConfigError if `target` exists.
    """
    base = model_folder(model_path(base))
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
    _write(target, base, copied, networks)
    return result


def _stays(path: Path, replaced: Container[str]) -> bool:
    """Return whether a file of the base is taken: all but weights and indices of the networks that are replaced."""
    part = path.parts[0]
    return not part.startswith(".") and (part not in replaced or path.name == "config.json")


def _write(target: Path, base: Path, copied: Sequence[Path], networks: Mapping[str, Converted]) -> None:
    """Write `copied` files of `base` and the networks (by part) under another name.

    It is renamed to `target` once described, which makes all the checks that loading makes, but for reading the
    weights; nothing stays of a folder that was not finished.
    """
    with new_folder(target, describe) as partial:
        for path in copied:
            place = partial / path.relative_to(base)
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(path.resolve(), place)
        for name, network in networks.items():
            stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
            write_shards(partial / name, stem, network.sizes(), network.read)
            config = read_json(partial / name / "config.json")
            if config.pop("quantization_config", None):  # of the base's weights; these are dense
                write_json(partial / name / "config.json", config)


def _link(source: Path, place: Path) -> None:
    """Link or copy a file: weights are never changed in place, so they may share the base's bytes."""
    if source.suffix == ".safetensors":
        try:
            return os.link(source, place)
        except OSError:  # another disk, or one without hard links
            pass
    shutil.copy2(source, place)
