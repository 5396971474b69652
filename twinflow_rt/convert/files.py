"""The folder that a conversion writes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import new_folder
from ..checkpoint.files import read_json
from ..checkpoint.shards import write_shards


def write_folder(
    target: Path, base: Path, copied: Sequence[Path], networks: Mapping[str, Any], verify: Callable[[Path], object]
) -> None:
    """Write `copied` files of `base` and the networks (part -> `Converted`) under another name.

    It is renamed to `target` once `verify` has accepted it; nothing stays of a folder that was not finished.
    """
    with new_folder(target, verify) as partial:
        for path in copied:
            place = partial / path.relative_to(base)
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(path.resolve(), place)
        for name, network in networks.items():
            stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
            write_shards(partial / name, stem, network.sizes(), network.read)
            config = read_json(partial / name / "config.json")
            if config.pop("quantization_config", None):  # of the base's weights; these are dense
                (partial / name / "config.json").write_text(json.dumps(config, indent=2))


def _link(source: Path, place: Path) -> None:
    """Link or copy a file: weights are never changed in place, so they may share the base's bytes."""
    if source.suffix == ".safetensors":
        try:
            return os.link(source, place)
        except OSError:  # another disk, or one without hard links
            pass
    shutil.copy2(source, place)
