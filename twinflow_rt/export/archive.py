"""The file that `export` writes: a PyTorch .pt2 archive (a zip file, nothing compressed).

    data/aotinductor/NAME/   compiled code of one program, as AOTInductor's loader wants it; no weights
    data/twinflow/KEY        the bytes of one weight, in the order of its strides, at a multiple of 64 bytes
    extra/tokenizer.json     where the text encoder is exported
    extra/manifest.json      written last: what the programs take and give, SHA-256 of every other record

Weights lie beside the programs, once, so programs of several sizes share them, and a reader maps them
from the file instead of copying them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import parse_json, require_file
from ..checkpoint.versions import refusal
from ..config import dtype_name
from ..errors import CheckpointError

FORMAT = 1
MANIFEST = "extra/manifest.json"
TOKENIZER = "extra/tokenizer.json"
TEXT = "text"  # the name of the program for token ids
PROGRAMS, WEIGHTS = "data/aotinductor/", "data/twinflow/"
ARCHIVE = {"archive_format": "pt2", "archive_version": "0"}
FIELDS = ("device", "dtype", "prompt", "latent", "noise", "sizes", "programs", "weights", "files")


class Writer:
    """Writes one archive, record by record; `close` adds the manifest, without which nothing loads."""

    def __init__(self, path: Path) -> None:
        self._file = torch._C.PyTorchFileWriter(str(path))
        self._file.set_min_version(6)
        self.files: dict[str, dict[str, Any]] = {}
        self.weights: dict[str, dict[str, Any]] = {}
        self.programs: dict[str, dict[str, Any]] = {}
        for name, content in ARCHIVE.items():
            self._file.write_record(name, content.encode(), len(content))

    def add(self, name: str, content: bytes) -> None:
        """Write one record and note its size and hash for the manifest."""
        self._file.write_record(name, content, len(content))
        self.files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def add_program(self, name: str, files: Sequence[Path], constants: Iterable[tuple[str, Tensor]]) -> None:
        """Write a compiled program's files and its constants (name in the program, tensor). Equal constants, of
        this program or of another, are stored once."""
        for file in files:
            self.add(f"{PROGRAMS}{name}/{file.name}", file.read_bytes())
        keys = {constant: self._add_weight(tensor) for constant, tensor in constants}
        self.programs[name] = {"constants": keys}

    def _add_weight(self, tensor: Tensor) -> str:
        """Store a tensor unless one of equal values, dtype and strides is stored; return its key."""
        storage = torch.as_strided(tensor, (storage_elements(tensor.shape, tensor.stride()),), (1,)).cpu()
        content = storage.view(torch.uint8).numpy().tobytes()
        what = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "strides": list(tensor.stride()),
        }
        key = hashlib.sha256(str(what).encode() + content).hexdigest()[:32]
        if key not in self.weights:
            self.add(WEIGHTS + key, content)
            self.weights[key] = what
        return key

    def close(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest (`facts` and what was added) and complete the file; return the manifest."""
        manifest = {
            "format": FORMAT, **facts, "programs": self.programs, "weights": self.weights, "files": self.files,
        }  # fmt: skip
        content = json.dumps(manifest, indent=1, allow_nan=False).encode()
        self._file.write_record(MANIFEST, content, len(content))
        self._file.write_end_of_file()
        return manifest


def image_name(height: int, width: int) -> str:
    """Return the name of the program for images of one size, in pixels."""
    return f"image_{height}x{width}"


def storage_elements(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many elements of storage lie from a tensor's first element to its last, both included."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


class Reader:
    """Opens an archive. Its file is mapped, not read.

    Raises CheckpointError for a file that is absent, was not written to its end, or has another format.
    """

    def __init__(self, path: Path) -> None:
        require_file(path, "write one with `twinflow-rt export`")
        self.path = path
        try:
            self._file = torch._C.PyTorchFileReader(str(path))
            self.names = set(self._file.get_all_records())
            manifest = parse_json(self._file.get_record(MANIFEST))
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} is no exported model, or a part of one ({reason}); export again") from None
        self.manifest: dict[str, Any] = _checked(manifest, path)
        self._storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

    def verify(self) -> None:
        """Read every record; raise CheckpointError unless each has the hash that the manifest states."""
        known = self.manifest["files"]
        for name, facts in known.items():
            if name not in self.names:
                raise CheckpointError(f"{self.path}: {name} is missing; export again")
            if hashlib.sha256(self._bytes(name, facts["bytes"]).numpy().data).hexdigest() != facts["sha256"]:
                raise CheckpointError(f"{self.path}: {name} does not match its hash; it was changed or damaged")

    def weight(self, key: str) -> Tensor:
        """Return a weight, mapped from the file, with the strides it was stored with."""
        what = self.manifest["weights"][key]
        dtype, shape, strides = getattr(torch, what["dtype"]), what["shape"], what["strides"]
        flat = self._bytes(WEIGHTS + key, storage_elements(shape, strides) * dtype.itemsize).view(dtype)
        return torch.as_strided(flat, shape, strides)

    def text(self, name: str) -> str:
        """Return a record that is UTF-8 text."""
        return bytes(self._file.get_record(name)).decode()

    def _bytes(self, name: str, size: int) -> Tensor:
        """Return the first `size` bytes of a record, uint8 [size], mapped from the file."""
        try:
            start = self._file.get_record_offset(name)  # type: ignore[attr-defined]
        except RuntimeError:
            raise CheckpointError(f"{self.path}: {name} is missing; export again") from None
        if start + size > self._storage.nbytes():
            raise CheckpointError(f"{self.path}: {name} reaches beyond the end of the file; export again")
        return torch.empty(0, dtype=torch.uint8).set_(self._storage, start, (size,), (1,))  # type: ignore[arg-type]


def _checked(manifest: Any, path: Path) -> dict[str, Any]:
    """Return the manifest; raise CheckpointError where its format is another or a field is absent."""
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(refusal(path, found, FORMAT, "export it again"))
    if absent := [field for field in FIELDS if field not in manifest]:
        raise CheckpointError(f"{path}: the manifest lacks {', '.join(absent)}; export it again")
    known: dict[str, Any] = manifest
    return known
