"""Adapters, merged into a checkpoint's tensors as they are read; of LoRA's (arXiv 2106.09685)

    W' = W + sum_i  weight_i * alpha_i / rank_i * B_i A_i        A [rank, in], B [out, rank]

in float32 on the target device, one tensor at a time, rounded once to what the network keeps. The
result reads like the checkpoint itself, so every later pass sees merged weights: a modulation or
time embedder that an adapter touches is merged before it is folded.

Other kinds, and how files name all this: `adapter_file`. Where no alpha is given, neither as a tensor nor in the
metadata, it is the rank: diffusers' rule.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import check_path, items, number, shown
from ..errors import CheckpointError, ConfigError
from ..ops.int4 import Int4Form
from .adapter_file import FILE_NAMES, AdapterFile, Module, Targets, product
from .artifact import sha256
from .checkpoint import Checkpoint
from .files import PICKLES, file_type, is_folder, require_file, some
from .names import class_of, names_of
from .tensor_files import read_tensor


@dataclass(frozen=True)
class Lora:
    """An adapter merged into the weights: its file's name, its weight, the file's SHA-256."""

    name: str
    weight: float
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} x {self.weight:g}"


Loras = Mapping[str | Path, float] | Sequence[str | Path | tuple[str | Path, float]]


def resolve_loras(loras: Loras) -> tuple[tuple[Path, float], ...]:
    """Return (path, weight) pairs of {path: weight}, [(path, weight), ...] or [path, ...] (weight 1)."""
    if isinstance(loras, (str, os.PathLike)):
        raise ConfigError(f"loras must be a list or a mapping, not one path; write loras=[{shown(loras)}]")
    entries = list(loras.items()) if isinstance(loras, Mapping) else items(loras)
    if entries is None:
        raise ConfigError(f"loras must be a list of paths or a mapping {{path: weight}}; got {shown(loras)}")
    pairs = []
    for entry in entries:
        path, weight = entry if isinstance(entry, (tuple, list)) and len(entry) == 2 else (entry, 1.0)
        if not isinstance(path, (str, os.PathLike)) or (found := number(weight)) is None:
            raise ConfigError(f"loras holds {shown(entry)}; each must be a path, or a path and a finite weight")
        pairs.append((Path(check_path("a path in loras", path)), found))
    return tuple(pairs)


def require_same(merged: Sequence[Lora], asked: Sequence[tuple[Path, float]] | None) -> None:
    """Raise ConfigError where other adapters are asked for than those `merged` into an artifact.

    None asks for none in particular. Compared are weights and the files' content, in any order.
    """
    if asked is None:
        return
    wanted = [Lora(adapter_path(path).name, weight, sha256(adapter_path(path))) for path, weight in asked]
    if sorted((x.sha256, x.weight) for x in wanted) != sorted((x.sha256, x.weight) for x in merged):
        has, other = (", ".join(map(str, loras)) or "no adapter" for loras in (merged, wanted))
        raise ConfigError(
            f"this artifact has {has} in its weights, not {other}: load the model folder instead, or save another"
        )


class Merged(Checkpoint):
    """A checkpoint with adapters merged in; reads like the checkpoint alone.

    loras: (path, weight) of each, as `resolve_loras` gives. check_finite: whether NaN and infinity in adapters are
    refused. files: `files` and `config` of a `Checkpoint`. Raises CheckpointError for what `Checkpoint` and `Adapter`
    refuse.
    """

    def __init__(
        self, folder: str | Path, loras: Sequence[tuple[Path, float]], check_finite: bool = True, **files: Any
    ) -> None:
        super().__init__(folder, **files)
        self.adapters = tuple(Adapter(path, weight, self) for path, weight in loras)
        if check_finite:
            for adapter in self.adapters:
                adapter.require_finite()
        self.loras = tuple(adapter.facts for adapter in self.adapters)
        self.notes = tuple(adapter.note for adapter in self.adapters if adapter.note)

    def int4_form(self, name: str) -> Int4Form | None:
        return None if any(name in adapter for adapter in self.adapters) else super().int4_form(name)

    def get(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        touching = [adapter for adapter in self.adapters if name in adapter]
        if not touching:
            return super().get(name, device, dtype)
        merged = super().get(name, device, torch.float32)
        for adapter in touching:
            merged = adapter.merge(name, merged)
        return merged.to(dtype or self.dtype(name))


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one tensor: scale * product of `factors`, the keys in its file by the names of
    `adapter_file.product`; of that, part `part` of `parts` by rows, whose halves trade places if `swapped`.

    magnitude: DoRA's, of the rows or the columns of the sum. distance: see `Targets.find`. A kind "LoRA" without
    magnitude can run beside the layer as well, as x A^T B^T.
    """

    kind: str
    factors: Mapping[str, str]
    scale: float
    rank: int | None
    part: int = 0
    parts: int = 1
    swapped: bool = False
    magnitude: str | None = None
    distance: int = 0

    def rows(self, tensor: Tensor) -> Tensor:
        """Return this part of a tensor's rows."""
        mine = tensor.chunk(self.parts)[self.part]
        return torch.cat(mine.chunk(2)[::-1]) if self.swapped else mine


class Adapter:
    """One adapter's file and its weight, matched against the checkpoint it will be merged into.

    path: the file, or a folder that holds it. changes: by tensors of the checkpoint. note: what is left out, or None.
    Opening reads headers, alphas and the file's hash. Raises CheckpointError for what `AdapterFile` refuses, for a
    target the checkpoint lacks, and for shapes that do not make it.
    """

    def __init__(self, path: Path, weight: float, checkpoint: Checkpoint) -> None:
        self.path = adapter_path(path)
        self.file = AdapterFile(self.path)
        self.facts = Lora(self.path.name, weight, sha256(self.path))
        self.weight, self.changes = weight, dict[str, Change]()
        kind = class_of(str(checkpoint.config.get("_class_name", "")))
        targets = Targets({name: None for name in checkpoint}, names_of(kind, checkpoint.config, set(checkpoint)))
        for module in self.file.modules.values():
            self._match(module, targets, checkpoint)
        count = len(self.file.text)
        self.note = f"{self.path.name}: its {count} tensors of text encoders are left out" if count else None

    def __contains__(self, name: str) -> bool:
        return name in self.changes

    def require_finite(self) -> None:
        """Raise CheckpointError for factors that hold NaN or infinity, or whose multiplier is beyond float32."""
        for name, change in self.changes.items():
            keys = filter(None, (*change.factors.values(), change.magnitude))
            if abs(self.weight * change.scale) > torch.finfo(torch.float32).max or not all(
                read_tensor(self.file.tensors, key).isfinite().all() for key in keys
            ):
                raise CheckpointError(
                    f"{self.path}: what it adds to {name} is NaN or infinity: damaged, or trained so; get it again, or "
                    "pass check_finite=False"
                )

    def merge(self, name: str, base: Tensor) -> Tensor:
        """Return `base` (float32) with this adapter's share of tensor `name`, as a new tensor.

        With DoRA's magnitude m, W' = m V / |V|, norms by rows or columns: PEFT's with V = W + weight * scale * B A; by
        `dora_scale` with V = W + scale * B A, of which W' takes `weight` and W the rest, as ComfyUI and LyCORIS do."""
        change = self.changes[name]
        factors = {part: self.file.read(key, base.device) for part, key in change.factors.items()}
        if "B" in factors:
            factors["B"] = change.rows(factors["B"])
        added = product(factors)
        added = (added if "B" in factors else change.rows(added)).reshape(base.shape)
        if change.magnitude is None:
            return torch.add(base, added, alpha=self.weight * change.scale)
        peft, magnitude = "dora_scale" not in change.magnitude, self.file.read(change.magnitude, base.device)
        columns = _by_columns(magnitude.shape)
        total = torch.add(base, added, alpha=change.scale * (self.weight if peft else 1))
        lengths = total.norm(dim=[axis for axis in range(total.ndim) if axis != columns], keepdim=True)
        magnitude = magnitude.flatten() if columns else change.rows(magnitude.flatten())
        total *= magnitude.reshape(lengths.shape) / lengths
        return total if peft else torch.lerp(base, total, self.weight)

    def _match(self, module: Module, targets: Targets, checkpoint: Checkpoint) -> None:
        """Add what a module changes; compare shapes. Of two modules for one tensor that with its own name counts."""
        if (found := targets.find(module.name)) is None:
            raise CheckpointError(
                f"{self.path} adapts {module.name}, which {checkpoint.folder} lacks; for another model?"
            )
        names, swapped, distance = found
        scale, parts = self.file.scale(module, names[0]), len(names)
        if module.factors:
            magnitude = module.keys.get("magnitude")
            self._require_shape(module, names, checkpoint)
            for part, name in enumerate(names):
                factor = 1.0 if module.kind == "diff" else scale
                self._add(name, Change(
                    module.kind, module.factors, factor, module.rank, part, parts, swapped, magnitude, distance
                ))  # fmt: skip
        for key, factor in (("diff_b", 1.0), ("bias", scale)):
            if key in module.keys:
                biases = [name.removesuffix("weight") + "bias" for name in names]
                known = all(name in checkpoint for name in biases)
                rows = sum(checkpoint.shape(name)[0] for name in biases) if known else None
                if module.shapes[key] != (rows,):
                    raise CheckpointError(
                        f"{self.path}: {module.keys[key]} has {module.shapes[key]}, and {some(biases)} "
                        f"{f'has {rows}' if known else 'is not in the checkpoint'}; for another model?"
                    )
                for part, name in enumerate(biases):
                    own = {"diff": module.keys[key]}
                    self._add(name, Change("diff", own, factor, None, part, parts, swapped, None, distance))

    def _require_shape(self, module: Module, names: tuple[str, ...], checkpoint: Checkpoint) -> None:
        """Raise CheckpointError where factors do not make the tensors `names`, or a magnitude is not of these."""
        shapes, base = {checkpoint.shape(name) for name in names}, checkpoint.shape(names[0])
        rows, columns = len(names) * base[0], math.prod(base[1:])
        try:
            made = module.shape()
        except RuntimeError:
            made = ()
        if len(shapes) != 1 or not made or made[0] != rows or math.prod(made) != rows * columns:
            has = " and ".join(f"{part.lstrip('k')} {module.shapes[part]}" for part in module.factors)
            raise CheckpointError(
                f"{self.path}: {module.name} has {has}, which do not make the {base} of {' + '.join(names)}; "
                "for another model?"
            )
        if magnitude := module.shapes.get("magnitude"):
            by_columns = _by_columns(magnitude)
            if math.prod(magnitude) != (base[1] if by_columns else rows) or (by_columns and len(names) > 1):
                raise CheckpointError(
                    f"{self.path}: {module.keys['magnitude']} has {magnitude}, "
                    f"not one for each row of {' + '.join(names)}: take the adapter of this model"
                )

    def _add(self, name: str, change: Change) -> None:
        before = self.changes.get(name)
        if before is not None and before.distance == change.distance:
            raise CheckpointError(f"{self.path} has two adapters for {name}; keep one")
        if before is None or change.distance < before.distance:
            self.changes[name] = change


def _by_columns(magnitude: Sequence[int]) -> int:
    """Return the axis whose entries magnitudes of this shape are for: 1 (inputs) for [1, in, ...], else 0 (rows)."""
    return int(len(magnitude) > 1 and magnitude[0] == 1 and magnitude[1] > 1)


def adapter_path(path: Path) -> Path:
    """Return the adapter file at `path`; in a folder, the one under the name that diffusers or PEFT gives it, else the
    only one, there or in a folder of it (PEFT makes one of every adapter that has a name)."""
    if is_folder(path):
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        found = found or sorted(path.glob("*.safetensors")) or sorted(path.glob("*/*.safetensors"))
        if len(found) == 1:
            return adapter_path(found[0])
        if found:
            names = some(str(p.relative_to(path)) for p in found)
            raise CheckpointError(f"{path} holds {names}; name the one to merge")
        if pickles := [p.name for p in path.iterdir() if p.suffix in PICKLES]:
            raise CheckpointError(
                f"{path} holds only pickles ({some(pickles)}), which can run code when read; convert them with "
                "safetensors.torch.save_file"
            )
        raise CheckpointError(f"{path} holds no adapter; give a folder with one of {', '.join(FILE_NAMES)}, or a file")
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when read; convert it with safetensors.torch.save_file"
        )
    if not file_type(path):
        raise CheckpointError(f"{path} does not exist; give a LoRA file (.safetensors) or the folder that holds it")
    require_file(path)
    return path
