"""Files that hold the tensors of one network: which are opened, and what an opened one offers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import GGUF, PICKLES, Declared, open_tensors, read_json, some
from .gguf_file import GGUFFile

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}  # in saved programs only
SHARD = re.compile(r"-\d{5}-of-\d{5}")
PLAIN_INDEX = ".safetensors.index.json"
INDEX = re.compile(r".+\.safetensors(\.[\w-]+)?\.index(\.[\w-]+)?\.json")  # a variant stands in any of three places
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


class TensorInfo(Protocol):
    """Shape and stored dtype of a tensor, before it is read."""

    def get_shape(self) -> Iterable[int]: ...
    def get_dtype(self) -> str: ...


class TensorFile(Protocol):
    """The part of safetensors' `safe_open` that is used here; dtypes have safetensors' names ("BF16").

    A file whose tensors are quantized serves them dense: `get_slice` names the dtype that they are best held in (BF16),
    `get_tensor` may return float32, which is finer. It then has `nbytes(name)`, too: the bytes that it keeps for one.
    Where it keeps weights in 4 bits it has `int4_form(name)`, their Int4Form by its header or None, and
    `get_int4(name)`, their Int4Weight, not rounded again, in row units of at most 127 (`ops.int4`).
    """

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


def stored_bytes(code: str, numel: int) -> int:
    """Return the bytes of so many numbers in a file. code: any dtype's name, of safetensors or torch."""
    bits = re.search(r"\d+", code)
    return -(-numel * (int(bits[0]) if bits else 8) // 8)  # a BOOL has 8


def open_file(path: Path) -> TensorFile:
    """Open a file of weights, mapped: GGUF by its name's end, else safetensors. Raises CheckpointError."""
    opened: TensorFile = GGUFFile(path) if path.suffix.lower() == GGUF else open_tensors(path)
    return opened


def open_folder(folder: Path) -> list[tuple[TensorFile, list[str]]]:
    """Open the weight files of a network's folder, headers only, and return each with the keys it provides.

    These are the shards of its index, the file with the usual name, or where there is neither, its only other file or
    index: a variant such as `model.fp16.safetensors` or `model.safetensors.index.fp16.json`. An index of which no shard
    is there counts only where nothing else does. Raises CheckpointError for a missing or damaged file, for pickles, and
    for an index that names a file outside the folder or a key that its file lacks.
    """
    indices = sorted(p for p in folder.iterdir() if INDEX.fullmatch(p.name))
    plain = [p for p in indices if p.name.endswith(PLAIN_INDEX) and "." not in p.name.removesuffix(PLAIN_INDEX)]
    if len(plain) > 1:
        raise CheckpointError(f"{folder} has several indices ({', '.join(p.name for p in plain)}); keep one")
    there = {p.name for p in folder.glob("*.safetensors")}
    files = [folder / name for name in sorted(there) if not SHARD.search(name)]
    usual = [folder / name for name in WEIGHT_NAMES if name in there]
    others = [p for p in indices if p not in plain] + files
    listed = [p for p in plain if not (usual or others) or there & _listing(p).keys()]
    chosen = listed or usual or others
    if len(chosen) > 1 and not usual:
        names = ", ".join(p.name for p in chosen)
        raise CheckpointError(f"{folder} has several weight files ({names}) and none of the usual names; keep one")
    if not chosen:
        return _open_other(folder)
    if chosen[0] in indices:
        return _open_shards(folder, chosen[0])
    file = open_tensors(chosen[0])
    return [(file, list(file.keys()))]


def _listing(index: Path) -> dict[str, list[str]]:
    """Return what an index says: file -> keys."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of key -> file; download it again")
    listing: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        listing.setdefault(name, []).append(key)
    return listing


def _open_shards(folder: Path, index: Path) -> list[tuple[TensorFile, list[str]]]:
    opened: list[tuple[TensorFile, list[str]]] = []
    for name, keys in _listing(index).items():
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


def _open_other(folder: Path) -> list[tuple[TensorFile, list[str]]]:
    """Open what a folder without weights to choose has in their place; else say what it lacks."""
    others = [path for path in folder.iterdir() if path.suffix.lower() == GGUF or path.name in READERS]
    if len(others) > 1:
        raise CheckpointError(f"{folder} has several weight files ({some(p.name for p in others)}); keep one")
    if others:
        file = READERS.get(others[0].name, open_file)(others[0])
        return [(file, list(file.keys()))]
    if shards := [p.name for p in folder.glob("*.safetensors")]:
        raise CheckpointError(f"{folder} has shards ({some(shards)}) without their index; download its .index.json")
    names = sorted(p.name for p in folder.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise CheckpointError(
            f"{folder} holds only pickles ({some(pickles)}), which can run code when read; "
            "convert them with safetensors.torch.save_file and try again"
        )
    raise CheckpointError(f"{folder} has no .safetensors file; the download is incomplete")
