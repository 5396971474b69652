"""Weights are written as one safetensors file, or as several with an index, as diffusers reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

SHARD_BYTES = 5_000_000_000  # a shard is held in memory while it is written


def write_shards(
    folder: Path, stem: str, sizes: Mapping[str, int], read: Callable[[list[str]], Mapping[str, Tensor]]
) -> None:
    """Write tensors to `folder`, in files of at most SHARD_BYTES (a larger tensor gets its own).

    stem: name of the files before their number. sizes: bytes by name. read(names): the tensors of one file, on the
    CPU; they are let go of before the next ones are asked for.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(_unshared(read(names)), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors contiguous, each in storage of its own: safetensors refuses split views of one merged weight."""
    seen: set[int] = set()
    out = {}
    for name, tensor in ((name, tensor.contiguous()) for name, tensor in tensors.items()):
        pointer = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if pointer in seen or tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        seen.add(pointer)
    return out
