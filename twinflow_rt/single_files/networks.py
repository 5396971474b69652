"""The networks of the base folder, and what a converted one takes from a file in place of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.files import read_json
from ..checkpoint.fuse import sources
from ..checkpoint.tensor_files import DTYPES, Declared, stored_bytes
from ..errors import CheckpointError, ConfigError
from ..families import CONNECTOR, family_of, parts_by_kind
from ..models.config import reading
from .names import FUSED, RULES, TEXT, Names
from .report import Key
from .sources import Source


class Slot:
    """A network of the base folder: what it is, and how other files name its tensors."""

    def __init__(self, folder: Path) -> None:
        self.name, config = folder.name, read_json(folder / "config.json")
        kind = config.get("_class_name") or config.get("model_type") or (self.name if self.name == CONNECTOR else None)
        if not isinstance(kind, str):
            raise CheckpointError(f"{folder / 'config.json'} names no _class_name or model_type; download it again")
        with reading(str(folder / "config.json")):
            rules = RULES[kind](config) if kind in RULES else TEXT if self.name.startswith("text_encoder") else Names()
        self.strip: tuple[str, ...] = ()
        self.shape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda name, shape: shape
        if self.name == "transformer":
            family = family_of(config)
            network, self.layout = family.build(family.config.from_dict(config)), family.layout
        elif part := parts_by_kind().get(kind):
            (network, self.layout), self.strip, self.shape = part.declare(config), part.strip, part.shape
        else:
            raise CheckpointError(f"{folder / 'config.json'} is of kind {kind!r}, none of the supported networks")
        self.expected = network.state_dict()
        self.wanted = {name for merged in self.expected for name in sources(merged, self.layout.fused)}
        fused = {end: parts for end, parts in FUSED.items() if not any(name.endswith(end) for name in self.wanted)}
        self.rules = replace(rules, splits={**fused, **rules.splits})

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


class Origin(NamedTuple):
    """Where a tensor comes from: a key of a source, which of how many parts of it, and whether its row halves trade
    places."""

    source: Source
    key: str
    part: int
    parts: int
    swapped: bool


class Converted:
    """A network whose tensors come from files: for `layout.check`, for writing, and read in place of a folder's
    (`checkpoint.NetworkFile`).

    where: origins by diffusers' names. names: the network's name of a tensor -> diffusers'. keys_found: what became of
    each key of the files.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.where: dict[str, Origin] = {}
        self.names: dict[str, str] = {}
        self.keys_found: list[Key] = []
        self._sources: list[Source] = []
        self._held: tuple[object, Any] = (None, None)  # what is read part by part

    def add(self, source: Source, keys: Sequence[Key]) -> None:
        """Take what one more source has and those before have not.

        Raises CheckpointError for a source with two tensors of one name, ConfigError for one that adds nothing."""
        own: dict[str, str] = {}
        for key in keys:
            for name in map(self.slot.bare, key.targets):
                if name in own:
                    raise CheckpointError(f"{source.path}: {key.source} and {own[name]} are both {name}")
                own[name] = key.source
        new = own.keys() - self.names.keys()
        if self._sources and not new & self.slot.wanted:
            name = self.slot.name
            raise ConfigError(f"{source.path} is a second {name} beside {self.folder}; give each network once")
        self._sources.append(source)
        for key in keys:
            for i, target in enumerate(key.targets):
                if (name := self.slot.bare(target)) in new:
                    self.where[target] = Origin(source, key.source, i, len(key.targets), key.swapped)
                    self.names[name] = target
        taken = (key for key in keys if not key.targets or new.intersection(map(self.slot.bare, key.targets)))
        self.keys_found += taken
        for name, others in self.slot.layout.tied.items():
            if name not in self.names and (found := next((other for other in others if other in self.names), None)):
                self.names[name] = self.names.pop(found)

    @property
    def folder(self) -> Path:
        """The files, as messages name them."""
        return Path(" + ".join(str(source.path) for source in self._sources))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The weight files."""
        return tuple(path for source in self._sources for path in source.paths)

    def keys(self) -> KeysView[str]:
        return self.names.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def stored_shape(self, target: str) -> tuple[int, ...]:
        """Return the tensor's shape under diffusers' name."""
        source, stored, _, parts, _ = self.where[target]
        shape = source.shape(stored)
        if parts > 1:
            if not shape or shape[0] % parts:
                raise CheckpointError(f"{source.path}: {stored} has rows that do not split in {parts}: {shape}")
            shape = (shape[0] // parts, *shape[1:])
        return shape[:2] if self._is_matrix(target, shape) else shape

    def shape(self, name: str) -> tuple[int, ...]:
        """Return its shape as the network sees it."""
        return self.slot.shape(name, self.stored_shape(self.names[name]))

    def dtype(self, name: str) -> torch.dtype:
        """Return its dtype in the file. Raises CheckpointError for one that weights are not kept in."""
        source, stored, *_ = self.where[self.names[name]]
        dtype = source.dtype(stored)
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{source.path}: {stored} is stored as {dtype}; take the file in one of {', '.join(DTYPES)}: "
                "quantize while loading (precision='int8' or 'fp8')"
            )
        return DTYPES[dtype]

    def get_slice(self, name: str) -> Declared:
        """Return shape and dtype of a tensor, as `TensorFile` has them."""
        target = self.names[name]
        return Declared(self.stored_shape(target), self._code(target))

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor by the network's name."""
        return self.get(self.names[name])

    def nbytes(self, name: str) -> int:
        """Return its bytes in the file."""
        source, stored, _, parts, _ = self.where[self.names[name]]
        return source.nbytes(stored) // parts

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every tensor to write, by its new name."""
        return {target: stored_bytes(self._code(target), math.prod(self.stored_shape(target))) for target in self.where}

    def read(self, targets: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors to write, by their new names; rows are copied out of what is split."""
        out = {}
        for target in targets:
            tensor = self.get(target)
            tensor = tensor.clone() if self.where[target].parts > 1 else tensor
            out[target] = tensor.to(DTYPES.get(self._code(target), tensor.dtype)).contiguous()
        return out

    def get(self, target: str) -> Tensor:
        """Return a tensor by diffusers' name; a part of another is a view of it."""
        at = self.where[target]
        rows: Tensor = self._whole(at, at.source.get)
        if at.parts > 1:
            rows = rows.chunk(at.parts)[at.part]
        if at.swapped:
            rows = torch.cat(rows.chunk(2)[::-1])
        return rows.reshape(self.stored_shape(target))

    def _whole(self, at: Origin, read: Callable[[str], Any]) -> Any:
        """Return read(key of `at`), which its parts, asked for one after the other, share."""
        wanted, (held, whole) = (at.source, at.key, read.__name__), self._held
        if held != wanted:
            whole = read(at.key)
        self._held = (wanted, whole) if at.part + 1 < at.parts else (None, None)
        return whole

    def _code(self, target: str) -> str:
        source, stored, *_ = self.where[target]
        return source.dtype(stored)

    def _is_matrix(self, target: str, shape: tuple[int, ...]) -> bool:
        pattern = self.slot.rules.matrices
        return pattern is not None and shape[2:] == (1, 1) and re.search(pattern, target) is not None
