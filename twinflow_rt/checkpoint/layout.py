"""How a network reads its folder, and the check that names and shapes of both agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import some
from .fuse import Fused, sources


@dataclass(frozen=True)
class Layout:
    """How one network reads its folder.

    fused: merged weights (see `fuse`). unused: prefixes of keys that a full checkpoint has and inference never needs.
    tied: other names that files may have a tensor under, as weights that a whole model shares are saved only once.
    dtype_of(name, dtype): the dtype to hold a tensor in where the network computes in `dtype`; None: as stored.
    absent(missing): a better explanation of missing keys, or None.
    """

    fused: Fused = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    dtype_of: Callable[[str, torch.dtype], torch.dtype | None] = lambda name, dtype: dtype
    absent: Callable[[set[str]], str | None] = lambda missing: None
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def float32_where(*parts: str) -> Callable[[str, torch.dtype], torch.dtype]:
    """Return a `Layout.dtype_of` that is float32 for names with one of these parts: norm weights, a handful of vectors
    that every token passes through."""
    return lambda name, dtype: torch.float32 if any(part in name for part in parts) else dtype


class Described(Protocol):
    """Names and shapes of tensors, and where they come from."""

    folder: Path

    def __iter__(self) -> Iterator[str]: ...
    def keys(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...


def check(expected: Mapping[str, Tensor], checkpoint: Described, layout: Layout) -> None:
    """Compare a module's tensors (meta is enough) with the checkpoint's: names and shapes, and the dtypes of those that
    are read.

    Raises CheckpointError for a missing or unknown name, for a shape that config.json does not ask for, and for a dtype
    that weights are not kept in.
    """
    wanted = {part for name in expected for part in sources(name, layout.fused)}
    found = {k for k in checkpoint if not k.startswith(layout.unused)}
    where = checkpoint.folder
    if missing := wanted - set(checkpoint.keys()):
        reason = layout.absent(missing) or f"missing {some(missing)}; another model, or an incomplete file"
        raise CheckpointError(f"{where}: {reason}")
    if unknown := found - wanted:
        raise CheckpointError(f"{where}: unknown {some(unknown)}; config.json and weights belong to different models")
    for name, tensor in expected.items():
        parts = sources(name, layout.fused)
        shapes = [checkpoint.shape(p) for p in parts]
        for part in parts:
            checkpoint.dtype(part)
        rows = sum(s[0] if s else 0 for s in shapes) if len(parts) > 1 else None
        got = shapes[0] if rows is None else (rows, *shapes[0][1:])
        if got != tuple(tensor.shape) or (rows is not None and any(s[1:] != shapes[0][1:] for s in shapes)):
            raise CheckpointError(
                f"{where}: {' + '.join(parts)} has shape {shapes if rows else got}, "
                f"config.json asks for {tuple(tensor.shape)}"
            )
