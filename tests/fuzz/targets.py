"""What is fuzzed: every reader that meets bytes from outside. A target may raise a `TwinFlowError`, nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.files import open_tensors, read_json
from twinflow_rt.checkpoint.gguf_file import GGUFFile
from twinflow_rt.checkpoint.quantized_files import dense_files
from twinflow_rt.checkpoint.tensor_files import DTYPES
from twinflow_rt.checkpoint.typed_json import typed
from twinflow_rt.errors import CheckpointError, TwinFlowError
from twinflow_rt.families import FAMILIES, family_of, parts_by_kind
from twinflow_rt.plan import Plan
from twinflow_rt.sampling.schedule import SamplerConfig

SEEDS = Path(__file__).parent / "seeds"


def tensors(file: Path) -> None:
    """A safetensors file: its header, then every tensor it declares, dense where it is quantized."""
    handle = open_tensors(file)
    for opened, names in dense_files([(handle, [*handle.keys()])], file):
        for name in names:
            part = opened.get_slice(name)
            if part.get_dtype() in DTYPES:
                assert list(opened.get_tensor(name).shape) == list(part.get_shape())


def gguf(file: Path) -> None:
    """A GGUF file: its header, then every tensor it declares, dense and in 4 bits."""
    handle = GGUFFile(file)
    for name in handle.keys():  # noqa: SIM118 (not a dict)
        with suppress(CheckpointError):  # scales of NaN
            assert handle.get_tensor(name).shape == handle.get_slice(name).get_shape()
            if handle.int4_form(name) is not None:
                handle.get_int4(name)


def plan(file: Path) -> None:
    """A plan, and beside it in artifact.json the sampler."""
    content = read_json(file)
    with suppress(ValueError):
        typed(content.get("sampler"), SamplerConfig, "sampler")
    read = Plan.from_dict(content.get("plan"))
    assert Plan.from_dict(read.to_dict()) == read and str(read)


def config(file: Path) -> None:
    """A network's config.json: what builds, builds on the meta device."""
    content = read_json(file)
    kind = content.get("_class_name") or content.get("model_type")
    if isinstance(kind, str) and (part := parts_by_kind().get(kind)):
        part.declare(content)
        return
    family = family_of(content)
    network = family.build(family.config.from_dict(content))
    assert all(p.is_meta for p in network.parameters())


def index(file: Path) -> None:
    """An index of shards, beside a folder with two of them."""
    folder = file.parent
    if not (folder / "config.json").exists():
        from safetensors.torch import save_file

        (folder / "config.json").write_text("{}")
        for name in ("a", "b"):
            save_file({name: torch.zeros(1)}, folder / f"{name}.safetensors")
    file.replace(folder / "x.safetensors.index.json")
    checkpoint = Checkpoint(folder)
    for name in checkpoint:
        checkpoint.get(name)


TARGETS: dict[str, Callable[[Path], None]] = {f.__name__: f for f in (tensors, gguf, plan, config, index)}
KINDS = (*FAMILIES, *parts_by_kind())


class Runner:
    """Runs one target on bytes, through a file in a folder of its own."""

    def __init__(self, name: str) -> None:
        self.target, self._folder = TARGETS[name], tempfile.TemporaryDirectory()
        self.file = Path(self._folder.name) / "input"

    def __call__(self, data: bytes) -> str:
        """The answer: "taken", or the refusal. Raises what the target raises beyond `TwinFlowError`."""
        self.file.write_bytes(data)
        try:
            self.target(self.file)
        except TwinFlowError as error:
            assert str(error)
            return str(error)
        return "taken"

    def close(self) -> None:
        self._folder.cleanup()
