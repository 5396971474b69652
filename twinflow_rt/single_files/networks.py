"""The networks of the base folder, and what a converted one takes from a file in place of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.files import read_json
from ..checkpoint.fuse import sources
from ..checkpoint.tensor_files import DTYPES, stored_bytes
from ..errors import CheckpointError
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
        for name, others in slot.layout.tied.items():
            if name not in self.names and (found := next((other for other in others if other in self.names), None)):
                self.names[name] = self.names.pop(found)

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

    def dtype(self, name: str) -> torch.dtype:
        """Return its dtype in the file. Raises CheckpointError for one that weights are not kept in."""
        stored = self.where[self.names[name]][0]
        dtype = self.source.dtype(stored)
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{self.folder}: {stored} is stored as {dtype}; take the file in one of {', '.join(DTYPES)}: "
                "quantize while loading (precision='int8' or 'fp8')"
            )
        return DTYPES[dtype]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every tensor to write, by its new name."""
        codes = {target: self.source.dtype(stored) for target, (stored, _, _) in self.where.items()}
        return {target: stored_bytes(code, math.prod(self.stored_shape(target))) for target, code in codes.items()}

    def read(self, targets: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors to write, by their new names; quantized ones in the dtype that they are best held in."""
        codes = {target: self.source.dtype(self.where[target][0]) for target in targets}
        return {target: self.get(target).to(DTYPES.get(code)).contiguous() for target, code in codes.items()}

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
