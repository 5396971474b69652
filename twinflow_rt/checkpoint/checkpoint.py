"""The tensors of one network, opened by name: headers first, then tensor by tensor, mapped file to target device.

Nothing is read that nobody asks for, and no file that could run code (a pickle) is ever opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..ops.int4 import Int4Form, Int4Weight
from .files import WEIGHTS, is_folder, read_json
from .load_report import Meter
from .quantized_files import dense_files
from .tensor_files import DTYPES, QUANTIZED, MemoryFile, TensorFile, open_folder, read_tensor, stored_bytes


class Checkpoint:
    """One network's folder (config.json and safetensors, whole or sharded), tensors read on demand.

    strip: key prefixes to drop; a key loses the first of them that it has (Qwen3ForCausalLM stores Qwen3Model under
    `model.`). quantized: whether int8 and float8 tensors are weights as they are held here, as in a saved program; in
    others they are read as dense ones (`quantized_files`). files: opened files
    that take the place of the folder's, with `config` in place of its config.json; messages call them `folder`.
    Opening reads headers only. Raises CheckpointError for a missing or truncated file, a pickle, an
    index that names a shard outside the folder, or a key that its shard lacks.
    """

    loras: tuple[Any, ...] = ()  # adapters merged in: none (see `lora.Merged`)
    notes: tuple[str, ...] = ()  # on them

    def __init__(
        self, folder: str | Path, *, strip: str | tuple[str, ...] = (), quantized: bool = False,
        files: Iterable[TensorFile] | None = None, config: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        self.files = None if files is None else tuple(files)
        self.meter = Meter()
        self._dtypes = DTYPES | QUANTIZED if quantized else DTYPES
        if self.files is None and not is_folder(self.folder):
            raise CheckpointError(f"{self.folder} is missing; the model folder is incomplete")
        self.config = read_json(self.folder / "config.json") if config is None else dict(config)
        prefixes = (strip,) if isinstance(strip, str) else strip
        given = [(file, list(file.keys())) for file in self.files or ()]
        stored = open_folder(self.folder) if self.files is None else given
        opened = stored if quantized else dense_files(stored, self.folder)
        self._where: dict[str, tuple[TensorFile, str]] = {}  # name -> the file that has it, and its key there
        for file, keys in opened:
            for key in keys:
                prefix = next((p for p in prefixes if key.startswith(p)), "")
                name = key.removeprefix(prefix)
                if name in self._where:
                    raise CheckpointError(f"{self.folder}: {name} stands twice, with and without {prefix}; keep one")
                self._where[name] = (file, key)
        if not self._where and self.files is None:
            raise CheckpointError(f"{self.folder} has files without any tensor; download them again")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Self:
        """Return a checkpoint of tensors in memory; messages call it `name`.

        `get` returns them as they are, not copies, where dtype and device are the ones they have.
        """
        return cls(name, files=[MemoryFile(tensors)], config=config)

    @classmethod
    def of_part(cls, folder: Path, files: Files, *args: Any, **options: Any) -> Self:
        """Return the network in `folder`, or what `files` has in its place. args, options: of the constructor."""
        if (found := files.get(folder.name)) is None:
            return cls(folder, *args, **options)
        return cls(found.folder, *args, files=found.files, config=found.config, **options)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The weight files."""
        if self.files is not None:
            return tuple(path for file in self.files for path in getattr(file, "paths", (self.folder,)))
        return tuple(path for path in sorted(self.folder.iterdir()) if path.suffix.lower() in WEIGHTS)

    def name_tied(self, tied: Mapping[str, tuple[str, ...]]) -> None:
        """Find tensors that the files have under another name. tied: name -> its other names, the likeliest first."""
        for name, others in tied.items():
            if name not in self and (found := next((other for other in others if other in self), None)):
                self._where[name] = self._where.pop(found)

    def keys(self) -> Iterable[str]:
        """Tensor names, `strip` removed."""
        return self._where.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        file, key = self._where[name]
        return tuple(file.get_slice(key).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype: float32, float16 or bfloat16. Raises CheckpointError for any other."""
        if (stored := self.code(name)) not in self._dtypes:
            raise CheckpointError(
                f"{self.folder}: {name} is stored as {stored}; expected one of {', '.join(self._dtypes)}: "
                "get the weights in one of these, and quantize while loading (precision='int8' or 'fp8')"
            )
        return self._dtypes[stored]

    def code(self, name: str) -> str:
        """Return the stored dtype as safetensors names it, e.g. BF16."""
        file, key = self._where[name]
        return file.get_slice(key).get_dtype()

    def main_dtype(self) -> torch.dtype:
        """Return the dtype that most of the bytes are stored in, of those that `dtype` returns. Raises what it does
        where there is none."""
        sizes: dict[str, int] = {}
        for name, (file, key) in self._where.items():
            stored = file.get_slice(key).get_dtype()
            sizes[stored] = sizes.get(stored, 0) + self.nbytes(name)
        read = [stored for stored in sizes if stored in self._dtypes]
        return self._dtypes[max(read, key=lambda stored: sizes[stored])] if read else self.dtype(next(iter(self)))

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor in its file, whatever its dtype, quantized or not."""
        file, key = self._where[name]
        if own := getattr(file, "nbytes", None):
            return int(own(key))
        return stored_bytes(file.get_slice(key).get_dtype(), self.numel(name))

    @property
    def has_blocks(self) -> bool:
        """Whether weights are stored in fewer bits than they are read in."""
        return any(map(self.in_blocks, self._where))

    def in_blocks(self, name: str) -> bool:
        """Return whether a tensor is stored in fewer bits than it is read in."""
        own = getattr(self._where[name][0], "nbytes", None)
        return own is not None and self.nbytes(name) < stored_bytes(self.code(name), self.numel(name))

    def int4_form(self, name: str) -> Int4Form | None:
        """Return how the file has a weight in 4 bits, as `get_int4` returns it; None where it does not."""
        file, key = self._where[name]
        return file.int4_form(key) if hasattr(file, "int4_form") else None

    def get_int4(self, name: str, device: torch.device | str = "cpu") -> Int4Weight:
        """Return the file's own 4 bits of a weight that has an `int4_form`, on `device`."""
        file, key = self._where[name]
        weight: Int4Weight = file.get_int4(key)  # type: ignore[attr-defined]  # whoever has an int4_form
        self.meter.add(self.nbytes(name))
        return weight.map(lambda tensor: tensor.to(device))

    def numel(self, name: str) -> int:
        """Return how many numbers a tensor has in its file."""
        file, key = self._where[name]
        return math.prod(file.get_slice(key).get_shape())

    def total_bytes(self) -> int:
        """Return the bytes of all tensors in the files."""
        return sum(self.nbytes(name) for name in self._where)

    def read(self, name: str) -> Tensor:
        """Return the tensor as its file has it; a quantized one may be finer than its `dtype`."""
        file, key = self._where[name]
        return read_tensor(file, key)

    def get(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor on `device` in `dtype` (None: as stored).

        On the CPU in the stored dtype it is a view of the mapped file: nothing is copied, pages come in on first use.
        """
        tensor = self.read(name).to(device).to(dtype or self.dtype(name))
        self.meter.add(self.nbytes(name))
        return tensor


Files = Mapping[str, Checkpoint]  # name of a network's folder -> what is read in its place
OWN_FILES: Files = {}  # every network is read from its own folder
