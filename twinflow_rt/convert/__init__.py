"""`twinflow-rt convert`: weight files under other names become a model folder in diffusers' layout.

A base folder, the released model in diffusers' layout, says what the model is (configs, tokenizer,
scheduler) and provides every network that the given files do not. Each file is recognised by its
names, every key is accounted for, and every shape compared before a byte is written. The folder
appears under its name only when complete and checked by what reads it later.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..describe import describe
from ..errors import CheckpointError, ConfigError
from ..models import (
    autoencoder_dc,
    autoencoder_kl,
    autoencoder_qwen,
    clip_text,
    family_of,
    gemma2,
    qwen2_5_vl,
    qwen3,
    t5,
)
from ..passes.fuse import sources
from ..passes.load import DTYPES, Layout, check, open_tensors, read_json, some
from ..stage import Model
from .names import CONTAINERS, RULES, Names, unchanged
from .report import Conversion, Key, PartReport

SHARD_BYTES = 5_000_000_000  # a shard is held in memory while it is written

# by _class_name or model_type of config.json
MODELS: dict[str, Model] = {
    "AutoencoderKL": autoencoder_kl.MODEL,
    "AutoencoderKLQwenImage": autoencoder_qwen.MODEL,
    "AutoencoderDC": autoencoder_dc.MODEL,
    "qwen3": qwen3.MODEL,
    "qwen2_5_vl": qwen2_5_vl.MODEL,
    "clip_text_model": clip_text.MODEL,
    "t5": t5.MODEL,
    "gemma2": gemma2.MODEL,
}


class Slot:
    """A network of the base folder: what it is, and how other files name its tensors."""

    def __init__(self, folder: Path) -> None:
        self.name, config = folder.name, read_json(folder / "config.json")
        kind = config.get("_class_name") or config.get("model_type")
        self.rules: Names = RULES.get(kind, unchanged)(config)
        if self.name == "transformer":
            family = family_of(config)
            with torch.device("meta"):
                network = family.network(family.config.from_dict(config))
            self.layout, self.strip = family.layout, ()
        elif kind in MODELS:
            network, self.layout = MODELS[kind].declare(config)
            self.strip = MODELS[kind].strip
        else:
            raise CheckpointError(f"{folder / 'config.json'} is of kind {kind!r}, none of the supported networks")
        self.expected = network.state_dict()
        self.wanted = {name for merged in self.expected for name in sources(merged, self.layout.fused)}
        video = kind == "AutoencoderKLQwenImage"
        self.shape = autoencoder_qwen.one_frame if video else lambda name, shape: shape

    def bare(self, name: str) -> str:
        """A name as the network has it, without the prefix some files give a language model's."""
        prefix = next((p for p in self.strip if name.startswith(p)), "")
        return name.removeprefix(prefix)

    def known(self, keys: Iterable[str]) -> set[str]:
        """What the network has of these keys, under its own names."""
        return {self.bare(t) for key in keys for t in self.rules.targets(key)} & self.wanted

    def likeness(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How well keys of these shapes fit: names known less names missing, and shapes that agree (of
        tensors that the network does not merge)."""
        known = self.known(shapes)
        own = ((self.bare(t), shape) for key, shape in shapes.items() for t in self.rules.targets(key)[:1])
        agree = sum(name in known & self.expected.keys() and self.expected[name].shape == shape for name, shape in own)
        return len(known) - (len(self.wanted) - len(known)) + agree


class Converted:
    """Tensors of an open file under their new names, for `passes.load.check` and for writing."""

    def __init__(self, file: Path, handle: Any, slot: Slot, keys: dict[str, Key]) -> None:
        self.folder, self.handle, self.slot = file, handle, slot
        self.where = {t: (stored, i, len(k.targets)) for stored, k in keys.items() for i, t in enumerate(k.targets)}
        self.swapped = {t for k in keys.values() if k.swapped for t in k.targets}
        self.names = {slot.bare(target): target for target in self.where}

    def keys(self):
        return self.names.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def stored_shape(self, target: str) -> tuple[int, ...]:
        """The tensor's shape in the new file."""
        stored, _, parts = self.where[target]
        shape = tuple(self.handle.get_slice(stored).get_shape())
        if parts > 1:
            if shape[0] % parts:
                raise CheckpointError(f"{self.folder}: {stored} has {shape[0]} rows, which do not split in {parts}")
            shape = (shape[0] // parts, *shape[1:])
        return shape[:2] if self._is_matrix(target, shape) else shape

    def shape(self, name: str) -> tuple[int, ...]:
        """The same as the network sees it."""
        return self.slot.shape(name, self.stored_shape(self.names[name]))

    def dtype(self, target: str) -> torch.dtype:
        stored = self.where[target][0]
        dtype = self.handle.get_slice(stored).get_dtype()
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{self.folder}: {stored} is stored as {dtype}; take the file in one of {', '.join(DTYPES)}: "
                "quantize after loading, not before"
            )
        return DTYPES[dtype]

    def get(self, target: str) -> Tensor:
        """The tensor to write; rows are copied out of what is split."""
        stored, index, parts = self.where[target]
        tensor = self.handle.get_tensor(stored)
        rows = tensor.chunk(parts)[index].clone() if parts > 1 else tensor
        if target in self.swapped:
            rows = torch.cat(rows.chunk(2)[::-1])
        return rows.reshape(self.stored_shape(target))

    def _is_matrix(self, target: str, shape: tuple[int, ...]) -> bool:
        pattern = self.slot.rules.matrices
        return pattern is not None and shape[2:] == (1, 1) and re.search(pattern, target) is not None


def convert(files: Sequence[Path], base: Path, target: Path, *, dry_run: bool = False) -> Conversion:
    """Writes `target`, the model of `base` with the networks found in `files` in place of its own.

    dry_run: only say what would be written, keys unknown or missing included. Raises CheckpointError
    for files that are not this model's, ConfigError if `target` exists.
    """
    if not base.is_dir() or not (base / "model_index.json").is_file():
        raise CheckpointError(f"{base} is no model folder in diffusers' layout (it needs model_index.json)")
    if target.exists():
        raise ConfigError(f"{target} exists; choose another name or remove it")
    slots = [Slot(p.parent) for p in sorted(base.glob("*/config.json"))]
    networks: dict[str, Converted] = {}
    reports: list[PartReport] = []
    for file in files:
        for network, report in _recognise(file, slots):
            if network.slot.name in networks:
                raise ConfigError(f"{file}: a second {network.slot.name}; give each network once")
            networks[network.slot.name] = network
            reports.append(report)
    copied = sorted(p for p in _base_files(base, set(networks)))
    names = sorted({p.relative_to(base).parts[0] for p in copied})
    result = Conversion(str(base), str(target), tuple(reports), tuple(names))
    if dry_run:
        return result
    result.require_complete()
    _write(target, base, copied, networks)
    return result


def _recognise(file: Path, slots: Sequence[Slot]) -> Iterator[tuple[Converted, PartReport]]:
    """The networks in a file. Keys in a container (`CONTAINERS`) belong to a network of that sort, the
    others to any; which one, the names decide."""
    handle = open_tensors(file)
    groups: dict[tuple[str, str], dict[str, str]] = {}  # container -> key in the file -> key without it
    for stored in handle.keys():  # noqa: SIM118 (not a dict)
        container, bare = _container(stored)
        groups.setdefault(container, {})[stored] = bare
    for (sort, _), group in groups.items():
        candidates = [s for s in slots if s.name.startswith(sort)]
        if not candidates:
            raise CheckpointError(f"{file}: holds a {sort}, which the base has not")
        shapes = {bare: tuple(handle.get_slice(stored).get_shape()) for stored, bare in group.items()}
        slot = max(candidates, key=lambda s: s.likeness(shapes))
        if not slot.known(shapes):
            raise CheckpointError(
                f"{file}: {some(shapes)} belong to none of the base's networks "
                f"({', '.join(s.name for s in slots)}); is the base the same model?"
            )
        rules = slot.rules
        keys = {stored: Key(stored, rules.targets(bare), rules.swapped(bare)) for stored, bare in group.items()}
        network = Converted(file, handle, slot, keys)
        yield network, _account(network, tuple(keys.values()))


def _container(key: str) -> tuple[tuple[str, str], str]:
    """((sort of network, its name among those), the key without its container); ("", "") if it has none."""
    for sort, pattern in CONTAINERS.items():
        if match := re.match(pattern, key):
            return (sort, match.groupdict().get("name", "")), key[match.end() :]
    return ("", ""), key


def _account(network: Converted, keys: tuple[Key, ...]) -> PartReport:
    """Compares names, shapes and dtypes with what the network declares."""
    slot = network.slot
    found = set(network.names)
    missing = slot.wanted - found
    unknown = {name for name in found - slot.wanted if not name.startswith(slot.layout.unused)}
    for target in network.where:
        network.dtype(target)
    if not missing:
        check(slot.expected, network, Layout(slot.layout.fused, (*slot.layout.unused, *unknown)))
    hint = slot.layout.absent(missing) if missing else None
    return PartReport(slot.name, str(network.folder), keys, tuple(sorted(unknown)), tuple(sorted(missing)), hint)


def _base_files(base: Path, replaced: set[str]) -> Iterator[Path]:
    """What is taken from the base: all but weights and indices of the networks that are replaced."""
    for path in base.rglob("*"):
        part = path.relative_to(base).parts[0]
        if path.is_dir() or part.startswith("."):
            continue
        if part not in replaced or path.name == "config.json":
            yield path


def _write(target: Path, base: Path, copied: Sequence[Path], networks: dict[str, Converted]) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for path in copied:
            place = partial / path.relative_to(base)
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(path.resolve(), place)
        for name, network in networks.items():
            stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
            _write_shards(partial / name, stem, network)
        describe(partial)  # all the checks that loading makes, but for reading the weights
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link(source: Path, place: Path) -> None:
    """Weights are never changed in place, so they may share the base's bytes where the disk allows."""
    if source.suffix == ".safetensors":
        try:
            return os.link(source, place)
        except OSError:  # another disk, or one without hard links
            pass
    shutil.copy2(source, place)


def _write_shards(folder: Path, stem: str, network: Converted) -> None:
    """One file, or shards of at most SHARD_BYTES and their index."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    total = size = 0
    for target in network.where:
        count = torch.Size(network.stored_shape(target)).numel() * network.dtype(target).itemsize
        if shards[-1] and size + count > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size, total = size + count, total + count
    weight_map = {}
    for i, targets in enumerate(shards):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({t: network.get(t).contiguous() for t in targets}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(targets, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
