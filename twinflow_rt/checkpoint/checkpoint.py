"""Reads a model folder: checked names first, then tensor by tensor, mapped file to target device.

Nothing is read before every name and shape has been compared with what the network declares, nothing
is read that the network does not use, and no file that could run code (a pickle) is ever opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from . import memory_file as memory
from . import random_file as random
from .files import check_tree, file_type, is_folder, open_tensors, read_json
from .fuse import Fused, sources, stack
from .load_report import LoadReport, Meter

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}  # in saved programs only
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
IMAGE_TASKS = ("Edit", "Img2Img", "Inpaint", "ControlNet", "Layered", "Kontext")  # in names of pipelines
SHOWN = 8  # names listed in one message

Progress = Callable[[int], None]  # called with the bytes just loaded


class Checkpoint:
    """One network's folder (config.json and safetensors, whole or sharded), tensors read on demand.

    `strip`: a key prefix to drop where present (Qwen3ForCausalLM stores Qwen3Model under `model.`), or
    several, of which a key loses the first that it has. quantized: int8 and float8 tensors are expected too (a
    saved program's).
    Opening reads headers only. Raises CheckpointError for a missing or truncated file, a pickle, an
    index that names a shard outside the folder, or a key that its shard lacks.
    """

    loras: tuple[Any, ...] = ()  # adapters merged in: none (see `passes.lora.Merged`)
    _dtypes: Mapping[str, torch.dtype] = DTYPES

    def __init__(self, folder: str | Path, *, strip: str | tuple[str, ...] = (), quantized: bool = False) -> None:
        self.folder = Path(folder)
        if quantized:
            self._dtypes = DTYPES | QUANTIZED
        if not is_folder(self.folder):
            raise CheckpointError(f"{self.folder} is missing; the model folder is incomplete")
        self.config = read_json(self.folder / "config.json")
        self._files: dict[str, Any] = {}
        self._where: dict[str, tuple[str, str]] = {}
        self.meter = Meter()
        prefixes = (strip,) if isinstance(strip, str) else strip
        for file, names in self._listing().items():
            for name in names:
                prefix = next((p for p in prefixes if name.startswith(p)), "")
                bare = name.removeprefix(prefix)
                if bare in self._where:
                    raise CheckpointError(f"{self.folder}: {bare} stands twice, with and without {prefix}; keep one")
                self._where[bare] = (file, name)
        if not self._where:
            raise CheckpointError(f"{self.folder} has files without any tensor; download them again")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Self:
        """Tensors in memory, read like those of a folder; messages call them `name`. In the dtype and
        on the device they have, `get` returns them as they are, not copies."""
        self = cls.__new__(cls)
        self.folder, self.config, self.meter = Path(name), dict(config), Meter()
        self._files, self._where = {"": memory.TensorFile(tensors, DTYPES)}, {key: ("", key) for key in tensors}
        return self

    def _listing(self) -> dict[str, list[str]]:
        """File -> the keys it provides."""
        indices = sorted(p.name for p in self.folder.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            raise CheckpointError(f"{self.folder} has several indices ({', '.join(indices)}); keep one")
        if not indices:
            file = self._single_file()
            return {file: list(self._open(file).keys())}
        index = self.folder / indices[0]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of key -> file; download it again")
        listing: dict[str, list[str]] = {}
        for key, file in weight_map.items():
            listing.setdefault(file, []).append(key)
        for file, keys in listing.items():
            # by name, not by resolved path: download caches link shards to files elsewhere
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index} names {file!r:.200}, not a .safetensors file of its own folder; download it again"
                )
            absent = sorted(set(keys) - set(self._open(file).keys()))
            if absent:
                raise CheckpointError(f"{index} places {some(absent)} in {file}, which lacks it; download both again")
        return listing

    def _single_file(self) -> str:
        found = sorted(p.name for p in self.folder.glob("*.safetensors"))
        for name in WEIGHT_NAMES:
            if name in found:
                return name
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(f"{self.folder} has several weight files ({', '.join(found)}) and no index; keep one")
        if (self.folder / random.FILE).is_file():
            return random.FILE
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{self.folder} holds only pickles ({', '.join(pickles)}), which can run code when read; "
                "convert them with safetensors.torch.save_file and try again"
            )
        raise CheckpointError(f"{self.folder} has no .safetensors file; the download is incomplete")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            self._files[file] = random.RandomFile(path, DTYPES) if file == random.FILE else open_tensors(path)
        return self._files[file]

    def _slice(self, name: str) -> Any:
        file, key = self._where[name]
        return self._files[file].get_slice(key)

    def keys(self) -> Iterable[str]:
        """Tensor names, `strip` removed."""
        return self._where.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype: float32, float16 or bfloat16; anything else is refused."""
        stored = self._slice(name).get_dtype()
        if stored not in self._dtypes:
            raise CheckpointError(
                f"{self.folder}: {name} is stored as {stored}; expected one of {', '.join(self._dtypes)}: "
                "quantize after loading, not before"
            )
        return self._dtypes[stored]

    def main_dtype(self) -> torch.dtype:
        """The dtype that most of the bytes are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for name in self._where:
            sizes[self.dtype(name)] = sizes.get(self.dtype(name), 0) + self.nbytes(name)
        return max(sizes, key=lambda dtype: sizes[dtype])

    def nbytes(self, name: str) -> int:
        size = self.dtype(name).itemsize
        for n in self.shape(name):
            size *= n
        return size

    def total_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(self.nbytes(name) for name in self._where)

    def get(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on `device` in `dtype` (None: as stored). On the CPU in the stored dtype it is
        a view of the mapped file: nothing is copied, pages come in on first use."""
        file, key = self._where[name]
        tensor: Tensor = self._files[file].get_tensor(key).to(device).to(dtype or self.dtype(name))
        self.meter.add(self.nbytes(name))
        return tensor


@dataclass(frozen=True)
class Layout:
    """How one network reads its folder.

    fused: merged weights. unused: prefixes of keys that a full checkpoint has and inference never
    needs. dtype_of(name): float32 or None (as stored) for tensors exempt from the compute dtype,
    else that dtype. absent(missing): a better explanation of missing keys, or None.
    """

    fused: Fused = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    dtype_of: Callable[[str, torch.dtype], torch.dtype | None] = lambda name, dtype: dtype
    absent: Callable[[set[str]], str | None] = lambda missing: None


class Described(Protocol):
    """Names and shapes of tensors, and where they come from."""

    folder: Path

    def __iter__(self) -> Iterator[str]: ...
    def keys(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...


def check(expected: Mapping[str, Tensor], checkpoint: Described, layout: Layout) -> None:
    """Compares the module's tensors (meta is enough) with the checkpoint's, names and shapes."""
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
        rows = sum(s[0] if s else 0 for s in shapes) if len(parts) > 1 else None
        got = shapes[0] if rows is None else (rows, *shapes[0][1:])
        if got != tuple(tensor.shape) or (rows is not None and any(s[1:] != shapes[0][1:] for s in shapes)):
            raise CheckpointError(
                f"{where}: {' + '.join(parts)} has shape {shapes if rows else got}, "
                f"config.json asks for {tuple(tensor.shape)}"
            )


def fetch(
    name: str, placeholder: Tensor, checkpoint: Checkpoint, layout: Layout, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """One module tensor, merged from its parts where the layout says so (`placeholder`: of its shape)."""
    parts, target = sources(name, layout.fused), layout.dtype_of(name, dtype)
    if len(parts) == 1:
        return checkpoint.get(name, device, target)
    return stack((checkpoint.get(p, device, target) for p in parts), len(placeholder))


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts `tensor` where `module` has the parameter (frozen) or buffer `name`."""
    path, _, leaf = name.rpartition(".")
    parent = module.get_submodule(path)
    setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in parent._parameters else tensor)


def materialize(
    module: nn.Module, checkpoint: Checkpoint, layout: Layout, device: torch.device, dtype: torch.dtype,
    progress: Progress | None = None, arrived: Callable[[str], None] = lambda name: None,
) -> LoadReport:  # fmt: skip
    """Fills `module` (built on the meta device) from `checkpoint`; afterwards it is frozen, in eval mode.
    arrived(name): called when that tensor is in its place."""
    checkpoint.meter.start()
    expected = module.state_dict()
    check(expected, checkpoint, layout)
    for name, placeholder in expected.items():
        before = checkpoint.meter.bytes_read
        assign(module, name, fetch(name, placeholder, checkpoint, layout, device, dtype))
        arrived(name)
        if progress is not None:
            progress(checkpoint.meter.bytes_read - before)
    module.eval()
    return checkpoint.meter.report(len(expected), checkpoint.total_bytes())


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    ordered = [f"{name:.200}" for name in sorted(names)]
    rest = len(ordered) - SHOWN
    return ", ".join(ordered[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def model_folder(path: Path) -> Path:
    """Checks that `path` is a whole text-to-image model (model_index.json and its four parts) and returns it."""
    if not file_type(path):
        raise CheckpointError(
            f"{path} does not exist; give a local model folder, 'demo', or hf://owner/name (docs/reliability.md)"
        )
    if not is_folder(path):
        raise CheckpointError(f"{path} is a single file; give the model folder (diffusers layout) instead")
    if not os.path.lexists(path / "model_index.json"):  # before a whole disk is walked
        raise CheckpointError(f"{path / 'model_index.json'} is missing; a model folder has the layout diffusers saves")
    check_tree(path)
    pipeline = str(read_json(path / "model_index.json").get("_class_name", ""))
    if any(task in pipeline for task in IMAGE_TASKS):
        raise CheckpointError(
            f"{path} is a {pipeline}, which takes images as input; only generation from text is supported "
            "(docs/editing.md says what more it would take)"
        )
    for part in ("transformer", "text_encoder", "tokenizer", "vae"):
        if not is_folder(path / part):
            raise CheckpointError(f"{path} has no {part}/ folder; the download is incomplete")
    return path
