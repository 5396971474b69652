"""`twinflow-rt convert`: weight files under other names become a model folder in diffusers' layout.

A base folder, the released model in diffusers' layout, says what the model is (configs, tokenizer,
scheduler) and provides every network that the given files do not. Each file is recognised by its
names, every key is accounted for, and every shape compared before a byte is written. The folder
appears under its name only when complete and checked by what reads it later.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.atomic import check_target
from ..checkpoint.files import check_tree, is_folder, read_json, some
from ..checkpoint.fuse import sources
from ..checkpoint.layout import Layout, check
from ..checkpoint.names import CONTAINERS, RULES, Names, unchanged
from ..checkpoint.tensor_files import DTYPES
from ..errors import CheckpointError, ConfigError
from ..families import family_of
from ..models.architecture import Architecture
from ..models.autoencoders import autoencoder_dc, autoencoder_kl, autoencoder_qwen
from ..models.config import reading
from ..models.text_encoders import clip_text, gemma2, qwen2_5_vl, qwen3, t5
from ..planning.description import describe
from .files import Source, open_sources, write_folder
from .report import Conversion, Key, PartReport

# by _class_name or model_type of config.json
MODELS: dict[str, Architecture] = {
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
        if not isinstance(kind, str):
            raise CheckpointError(f"{folder / 'config.json'} names no _class_name or model_type; download it again")
        with reading(str(folder / "config.json")):
            self.rules: Names = RULES.get(kind, unchanged)(config)
        self.strip: tuple[str, ...] = ()
        if self.name == "transformer":
            family = family_of(config)
            network = family.build(family.config.from_dict(config))
            self.layout = family.layout
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
        """Return a name as the network has it, without the prefix some files give a language model's."""
        prefix = next((p for p in self.strip if name.startswith(p)), "")
        return name.removeprefix(prefix)

    def known(self, keys: Iterable[str]) -> set[str]:
        """Return what the network has of these keys, under its own names."""
        return {self.bare(t) for key in keys for t in self.rules.targets(key)} & self.wanted

    def likeness(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return how well keys of these shapes fit: names known less names missing, and shapes that agree (of
        tensors that the network does not merge)."""
        known = self.known(shapes)
        own = ((self.bare(t), shape) for key, shape in shapes.items() for t in self.rules.targets(key)[:1])
        agree = sum(name in known & self.expected.keys() and self.expected[name].shape == shape for name, shape in own)
        return 2 * len(known) - len(self.wanted) + int(agree)


class Converted:
    """Tensors of a source under their new names, for `layout.check` and for writing."""

    def __init__(self, source: Source, slot: Slot, keys: Sequence[Key]) -> None:
        self.folder, self.source, self.slot = source.path, source, slot
        self.where: dict[str, tuple[str, int, int]] = {}
        for key in keys:
            for i, name in enumerate(key.targets):
                if name in self.where:
                    raise CheckpointError(f"{source.path}: {key.source} and {self.where[name][0]} are both {name}")
                self.where[name] = (key.source, i, len(key.targets))
        self.swapped = {t for k in keys if k.swapped for t in k.targets}
        self.names = {slot.bare(target): target for target in self.where}

    def keys(self) -> KeysView[str]:
        return self.names.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def stored_shape(self, target: str) -> tuple[int, ...]:
        """Return the tensor's shape in the new file."""
        stored, _, parts = self.where[target]
        shape = self.source.shape(stored)
        if parts > 1:
            if not shape or shape[0] % parts:
                raise CheckpointError(f"{self.folder}: {stored} has rows that do not split in {parts}: {shape}")
            shape = (shape[0] // parts, *shape[1:])
        return shape[:2] if self._is_matrix(target, shape) else shape

    def shape(self, name: str) -> tuple[int, ...]:
        """Return its shape as the network sees it."""
        return self.slot.shape(name, self.stored_shape(self.names[name]))

    def dtype(self, target: str) -> torch.dtype:
        stored = self.where[target][0]
        dtype = self.source.dtype(stored)
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{self.folder}: {stored} is stored as {dtype}; take the file in one of {', '.join(DTYPES)}: "
                "quantize after loading, not before"
            )
        return DTYPES[dtype]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every tensor to write, by its new name."""
        return {name: math.prod(self.stored_shape(name)) * self.dtype(name).itemsize for name in self.where}

    def read(self, targets: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors to write, by their new names."""
        return {target: self.get(target).contiguous() for target in targets}

    def get(self, target: str) -> Tensor:
        """Return the tensor to write; rows are copied out of what is split."""
        stored, index, parts = self.where[target]
        tensor = self.source.get(stored)
        rows = tensor.chunk(parts)[index].clone() if parts > 1 else tensor
        if target in self.swapped:
            rows = torch.cat(rows.chunk(2)[::-1])
        return rows.reshape(self.stored_shape(target))

    def _is_matrix(self, target: str, shape: tuple[int, ...]) -> bool:
        pattern = self.slot.rules.matrices
        return pattern is not None and shape[2:] == (1, 1) and re.search(pattern, target) is not None


def convert(files: Sequence[Path], base: Path, target: Path, *, dry_run: bool = False) -> Conversion:
    """Write `target`, the model of `base` with the networks found in `files` in place of its own.

    files: safetensors files, or folders of them. dry_run: only say what would be written, keys unknown or
    missing included. Raises CheckpointError for files that are not this model's, ConfigError if `target`
    exists.
    """
    if not is_folder(base) or not (base / "model_index.json").is_file():
        raise CheckpointError(f"{base} is no model folder in diffusers' layout (it needs model_index.json)")
    check_tree(base)
    check_target(target, "the folder to write", make_parents=True)
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists; choose another name or remove it")
    slots = [Slot(p.parent) for p in sorted(base.glob("*/config.json"))]
    networks: dict[str, Converted] = {}
    reports: list[PartReport] = []
    for source in open_sources(files):
        for network, report in _recognise(source, slots):
            if network.slot.name in networks:
                raise ConfigError(f"{source.path}: a second {network.slot.name}; give each network once")
            networks[network.slot.name] = network
            reports.append(report)
    copied = sorted(p for p in _base_files(base, set(networks)))
    names = sorted({p.relative_to(base).parts[0] for p in copied})
    result = Conversion(str(base), str(target), tuple(reports), tuple(names))
    if dry_run:
        return result
    result.require_complete()
    # describe makes all the checks that loading makes, but for reading the weights
    write_folder(target, base, copied, networks, describe)
    return result


def _recognise(source: Source, slots: Sequence[Slot]) -> Iterator[tuple[Converted, PartReport]]:
    """Yield the networks in a source. Keys in a container (`CONTAINERS`) belong to a network of that sort, the
    others to any; which one, the names decide."""
    groups: dict[tuple[str, str], dict[str, str]] = {}  # container -> key in the file -> key without it
    for stored in source:
        container, bare = _container(stored)
        groups.setdefault(container, {})[stored] = bare
    for (sort, _), group in groups.items():
        candidates = [s for s in slots if s.name.startswith(sort)]
        if not candidates:
            raise CheckpointError(f"{source.path}: holds a {sort}, which the base has not")
        shapes = {bare: source.shape(stored) for stored, bare in group.items()}
        slot = max(candidates, key=lambda s: s.likeness(shapes))
        if not slot.known(shapes):
            raise CheckpointError(
                f"{source.path}: {some(shapes)} belong to none of the base's networks "
                f"({', '.join(s.name for s in slots)}); is the base the same model?"
            )
        rules = slot.rules
        keys = tuple(Key(stored, rules.targets(bare), rules.swapped(bare)) for stored, bare in group.items())
        network = Converted(source, slot, keys)
        yield network, _account(network, keys)


def _container(key: str) -> tuple[tuple[str, str], str]:
    """Return (sort of network, its name among those), and the key without its container; ("", "") if it has none."""
    for sort, pattern in CONTAINERS.items():
        if match := re.match(pattern, key):
            return (sort, match.groupdict().get("name", "")), key[match.end() :]
    return ("", ""), key


def _account(network: Converted, keys: tuple[Key, ...]) -> PartReport:
    """Compare names, shapes and dtypes with what the network declares; return what was found."""
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
    """Yield what is taken from the base: all but weights and indices of the networks that are replaced."""
    for path in base.rglob("*"):
        part = path.relative_to(base).parts[0]
        if path.is_dir() or part.startswith("."):
            continue
        if part not in replaced or path.name == "config.json":
            yield path
