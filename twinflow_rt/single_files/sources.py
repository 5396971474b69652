"""Files whose names and shapes say which networks they hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from ..checkpoint.files import PICKLES, is_folder
from ..checkpoint.quantized_files import dense_files
from ..checkpoint.tensor_files import INDEX, WEIGHTS, TensorFile, open_file, open_folder, read_tensor, stored_bytes
from ..errors import CheckpointError


class Source:
    """The tensors of one file, or of the shards that a folder's index lists, under their stored names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        handle = None if is_folder(path) else open_file(path)
        opened = open_folder(path) if handle is None else [(handle, list(handle.keys()))]
        inside = sorted(path.iterdir()) if handle is None else ()
        self.paths = tuple(file for file in inside if file.suffix.lower() in WEIGHTS) or (path,)
        self._where: dict[str, TensorFile] = {key: handle for handle, keys in dense_files(opened, path) for key in keys}

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._where[key].get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """As safetensors names it, e.g. BF16."""
        return self._where[key].get_slice(key).get_dtype()

    def nbytes(self, key: str) -> int:
        """Return the bytes of a tensor in its file."""
        own = getattr(self._where[key], "nbytes", None)
        return int(own(key)) if own else stored_bytes(self.dtype(key), math.prod(self.shape(key)))

    def get(self, key: str) -> Tensor:
        return read_tensor(self._where[key], key)


def open_sources(paths: Iterable[Path]) -> Iterator[Source]:
    """Open files as given; of a folder, every file in it and below; where an index or a config.json stands, those that
    loading would read."""
    for path in paths:
        if not is_folder(path):
            if path.suffix in PICKLES:
                raise CheckpointError(
                    f"{path} is a pickle, which can run code when read; save its tensors with safetensors first"
                )
            yield Source(path)
            continue
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in WEIGHTS)
        if not files:
            raise CheckpointError(f"{path} holds no .safetensors or .gguf file; give files of weights")
        names = {f.parent: {other.name for other in f.parent.iterdir()} for f in files}
        networks = {at for at, found in names.items() if "config.json" in found or any(map(INDEX.fullmatch, found))}
        for source in (*sorted(networks), *(file for file in files if file.parent not in networks)):
            yield Source(source)
