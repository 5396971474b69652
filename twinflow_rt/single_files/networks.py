"""The networks of the base folder, and what a converted one takes from a file in place of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import Declared, read_json
from ..checkpoint.fuse import sources
from ..checkpoint.names import TEXT, Key, Names, class_of, names_of
from ..checkpoint.tensor_files import DTYPES, stored_bytes
from ..errors import CheckpointError, ConfigError
from ..families import CONNECTOR, Family, family_of, parts_by_kind
from ..models.config import reading
from ..ops.int4 import Int4Form, Int4Weight


class Slot:
    """A network of the base folder: what it is, and how other files name its tensors."""

    def __init__(self, folder: Path) -> None:
        self.name, config = folder.name, read_json(folder / "config.json")
        kind = config.get("_class_name") or config.get("model_type") or (self.name if self.name == CONNECTOR else None)
        if not isinstance(kind, str):
            raise CheckpointError(f"{folder / 'config.json'} names no _class_name or model_type; download it again")
        kind = class_of(kind)
        self.config, self.read = config, Checkpoint
        self.family: Family | None = None
        self.strip: tuple[str, ...] = ()
        if self.name == "transformer":
            self.family = family_of(config)
            network, self.layout = self.family.build(self.family.config.from_dict(config)), self.family.layout
        elif part := parts_by_kind().get(kind):
            (network, self.layout), self.strip, self.read = part.declare(config), part.strip, part.read
        else:
            raise CheckpointError(f"{folder / 'config.json'} is of kind {kind!r}, none of the supported networks")
        self.expected = network.state_dict()
        self.wanted = {name for merged in self.expected for name in sources(merged, self.layout.fused)}
        with reading(str(folder / "config.json")):
            default = TEXT if self.name.startswith("text_encoder") else Names()
            self.rules = names_of(kind, config, self.wanted, default)

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
    """Where a tensor comes from: a source's key, which of how many parts of it, whether its row halves trade places."""

    source: Checkpoint
    key: str
    part: int
    parts: int
    swapped: bool


class Converted:
    """The tensors of a network in files, under diffusers' names, as a `TensorFile`.

    where: their origins. found: what became of each key of the files.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.where: dict[str, Origin] = {}
        self.found: list[Key] = []
        self.sources: list[Checkpoint] = []
        self._held: tuple[object, Any] = (None, None)  # what is read part by part

    def add(self, source: Checkpoint, keys: Sequence[Key]) -> None:
        """Take what one more source has and those before have not.

        Raises CheckpointError for a source with two tensors of one name, ConfigError for one that adds nothing."""
        own: dict[str, Origin] = {}
        for key in keys:
            for part, target in enumerate(key.targets):
                if target in own:
                    raise CheckpointError(f"{source.folder}: {key.source} and {own[target].key} are both {target}")
                own[target] = Origin(source, key.source, part, len(key.targets), key.swapped)
        new = own.keys() - self.where.keys()
        if self.where and not self.slot.wanted.intersection(map(self.slot.bare, new)):
            others = f"{self.slot.name} beside {' + '.join(str(each.folder) for each in self.sources)}"
            raise ConfigError(f"{source.folder} is a second {others}; give each network once")
        self.found += (key for key in keys if not key.targets or new.intersection(key.targets))
        self.where = own | self.where
        self.sources.append(source)

    def checkpoint(self) -> Checkpoint:
        """Return the network as it is read in place of the base's."""
        name = " + ".join(str(source.folder) for source in self.sources)
        network = self.slot.read(name, strip=self.slot.strip, files=[self], config=self.slot.config)
        network.name_tied(self.slot.layout.tied)
        return network

    @property
    def paths(self) -> tuple[Path, ...]:
        """The weight files."""
        return tuple(path for source in self.sources for path in source.paths)

    def keys(self) -> KeysView[str]:
        return self.where.keys()

    def get_slice(self, target: str) -> Declared:
        """Return shape and dtype of a tensor. Raises CheckpointError for one that does not split."""
        source, stored, _, parts, _ = self.where[target]
        shape = source.shape(stored)
        if parts > 1:
            if not shape or shape[0] % parts:
                raise CheckpointError(f"{source.folder}: {stored} has rows that do not split in {parts}: {shape}")
            shape = (shape[0] // parts, *shape[1:])
        pattern = self.slot.rules.matrices
        matrix = pattern is not None and shape[2:] == (1, 1) and re.search(pattern, target)
        return Declared(shape[:2] if matrix else shape, source.code(stored))

    def get_tensor(self, target: str) -> Tensor:
        """Return a tensor; a part of another is a view of it."""
        at = self.where[target]
        rows: Tensor = self._whole(at, at.source.read)
        if at.parts > 1:
            rows = rows.chunk(at.parts)[at.part]
        if at.swapped:
            rows = torch.cat(rows.chunk(2)[::-1])
        return rows.reshape(self.get_slice(target).get_shape())

    def nbytes(self, target: str) -> int:
        """Return the bytes of a tensor in its file."""
        at = self.where[target]
        return at.source.nbytes(at.key) // at.parts

    def int4_form(self, target: str) -> Int4Form | None:
        """Return how the file has a weight in 4 bits, or None, as a `Checkpoint` does."""
        at = self.where[target]
        return None if at.swapped else at.source.int4_form(at.key)

    def get_int4(self, target: str) -> Int4Weight:
        """Return the file's own 4 bits of a weight that has an `int4_form`."""
        at = self.where[target]
        weight: Int4Weight = self._whole(at, at.source.get_int4)
        return weight.map(lambda rows: rows.chunk(at.parts)[at.part])

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every tensor to write."""
        slices = {target: self.get_slice(target) for target in self.where}
        return {target: stored_bytes(at.get_dtype(), math.prod(at.get_shape())) for target, at in slices.items()}

    def read(self, targets: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors to write, in the dtypes that they have here."""
        codes = {target: self.get_slice(target).get_dtype() for target in targets}
        return {target: self.get_tensor(target).to(DTYPES.get(code)) for target, code in codes.items()}

    def _whole(self, at: Origin, read: Callable[[str], Any]) -> Any:
        """Return read(key of `at`), which its parts, asked for one after the other, share."""
        wanted, (held, whole) = (at.source, at.key, read.__name__), self._held
        whole = whole if held == wanted else read(at.key)
        self._held = (wanted, whole) if at.part + 1 < at.parts else (None, None)
        return whole
