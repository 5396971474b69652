"""Files that hold the tensors of one network: which are opened, and what an opened one offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import PICKLES, open_tensors, read_json, some

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}  # in saved programs only
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


class TensorInfo(Protocol):
    """Shape and stored dtype of a tensor, before it is read."""

    def get_shape(self) -> Iterable[int]: ...
    def get_dtype(self) -> str: ...


class TensorFile(Protocol):
    """The part of safetensors' `safe_open` that is used here; dtypes have safetensors' names ("BF16")."""

    def keys(self) -> Iterable[str]: ...
    def get_slice(self, name: str) -> TensorInfo: ...
    def get_tensor(self, name: str) -> Tensor: ...


def read_tensor(file: TensorFile, key: str) -> Tensor:
    """Return a tensor of a file. Torch loses what a signal's handler raises (Ctrl-C) while a tensor is made of mapped
    bytes, and reports bytes without a shape: that is a KeyboardInterrupt again."""
    try:
        return file.get_tensor(key)
    except ValueError as error:
        if "could not determine the shape of object type" in str(error):
            raise KeyboardInterrupt from None
        raise


# Other files that a network's folder may have in place of safetensors: their name -> what opens one. Empty here;
# whoever makes such files adds its reader (the bench does, for weights that are drawn when they are read).
READERS: dict[str, Callable[[Path], TensorFile]] = {}


class Declared:
    """Shape and stored dtype of a tensor that need not exist yet."""

    def __init__(self, shape: tuple[int, ...], code: str) -> None:
        self._shape, self._code = shape, code

    def get_shape(self) -> tuple[int, ...]:
        return self._shape

    def get_dtype(self) -> str:
        return self._code


class MemoryFile:
    """Tensors that are in memory already, read like a file: as they are, not as copies."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_slice(self, name: str) -> Declared:
        tensor = self._tensors[name]
        code = next((code for code, dtype in DTYPES.items() if dtype == tensor.dtype), str(tensor.dtype))
        return Declared(tuple(tensor.shape), code)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def open_folder(folder: Path) -> list[tuple[TensorFile, list[str]]]:
    """Open the weight files of a network's folder, headers only, and return each with the keys it provides.

    Raises CheckpointError for a missing or damaged file, for pickles, and for an index that names a file outside the
    folder or a key that its file lacks.
    """
    indices = sorted(p.name for p in folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder} has several indices ({', '.join(indices)}); keep one")
    if indices:
        return _open_shards(folder, folder / indices[0])
    file = _open_single(folder)
    return [(file, list(file.keys()))]


def _open_shards(folder: Path, index: Path) -> list[tuple[TensorFile, list[str]]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of key -> file; download it again")
    listing: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        listing.setdefault(name, []).append(key)
    opened: list[tuple[TensorFile, list[str]]] = []
    for name, keys in listing.items():
        # by name, not by resolved path: download caches link shards to files elsewhere
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {name!r:.200}, not a .safetensors file of its own folder; download it again"
            )
        file = open_tensors(folder / name)
        absent = sorted(set(keys) - set(file.keys()))
        if absent:
            raise CheckpointError(f"{index} places {some(absent)} in {name}, which lacks it; download both again")
        opened.append((file, keys))
    return opened


def _open_single(folder: Path) -> TensorFile:
    """Open the one weight file of a folder without an index."""
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    usual = [name for name in WEIGHT_NAMES if name in found]
    if usual or len(found) == 1:
        file: TensorFile = open_tensors(folder / (*usual, *found)[0])
        return file
    if found:
        raise CheckpointError(f"{folder} has several weight files ({', '.join(found)}) and no index; keep one")
    for name, open_file in READERS.items():
        if (folder / name).is_file():
            return open_file(folder / name)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickles ({', '.join(pickles)}), which can run code when read; "
            "convert them with safetensors.torch.save_file and try again"
        )
    raise CheckpointError(f"{folder} has no .safetensors file; the download is incomplete")
