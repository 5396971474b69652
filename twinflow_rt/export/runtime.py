"""Runs an exported file from Python: the same steps as `csrc/embed` in C++, without this package's networks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check_count, check_flag, check_integer, check_path, check_sides, items, resolve_device, shown
from ..errors import CheckpointError, ConfigError, StorageError
from ..runtime.host_state import isolated
from ..sampling.noise import check_batch, initial_noise, resolve_seeds, step_noise
from ..stages.text import PromptEmbeds
from .archive import TEXT, Reader, image_name

CPUS = ("DEFAULT", "AVX2", "AVX512")  # each runs the code of those before it


@isolated()
def load_exported(path: str | Path, *, verify: bool = True) -> Exported:
    """Open a file written by `twinflow-rt export`. verify: compare every part with its hash first.

    Programs are loaded when first used; weights are mapped from the file, which must stay.
    Raises CheckpointError for a file that is not whole, was changed, or was compiled for another torch or
    processor; DeviceError where its device is absent.
    """
    verify, exported = check_flag("verify", verify), Exported(Path(check_path("path", path)))
    if verify:
        exported.archive.verify()
    return exported


class Exported:
    """A loaded file. `manifest`: what it holds and takes (docs/embedding.md)."""

    def __init__(self, path: Path) -> None:
        self.archive = Reader(path)
        self.manifest = self.archive.manifest
        check_machine(self.manifest, path)
        self.device = resolve_device(self.manifest["device"])
        self.dtype: torch.dtype = getattr(torch, self.manifest["dtype"])
        self.sizes = [(height, width) for height, width in self.manifest["sizes"]]
        self._programs: dict[str, Any] = {}
        self._weights: dict[str, Tensor] = {}

    @isolated()
    def __call__(
        self, prompt: PromptEmbeds, *, height: int | None = None, width: int | None = None,
        seed: int | Sequence[int] | None = None, num_images: int = 1,
    ) -> Tensor:  # fmt: skip
        """Return images, uint8 [B, H, W, 3] on the device, `num_images` per prompt, those of a prompt together.

        prompt: embeddings as `Pipeline.text` or `encode` gives them. height, width: one of `sizes`; default the
        first. seed: as for `Pipeline`. Raises ConfigError for a size or prompt that the file was not made for.
        """
        num_images, first = check_count("num_images", num_images), self.sizes[0]
        size = tuple(k if s is None else s for s, k in zip(check_sides("size", (height, width)), first, strict=True))
        check_batch(num_images)
        if size not in self.sizes:
            have = ", ".join(f"{w}x{h}" for h, w in self.sizes)
            raise ConfigError(f"no program for {shown(size[1])}x{shown(size[0])} was exported; this file has {have}")
        embeds, lengths = self._padded(prompt)
        seeds = resolve_seeds(seed, len(prompt) * num_images)
        latent, streams = self.manifest["latent"], self.manifest["noise"]["streams"]
        shape = (latent["channels"], size[0] // latent["scale"], size[1] // latent["scale"])
        rest = [self._extra(prompt, *entry) for entry in self.manifest["prompt"]["extras"]]
        inputs = [tensor.repeat_interleave(num_images, 0) for tensor in (embeds, lengths, *rest)]
        if streams:
            noise = torch.stack([step_noise(seeds, i + 1, shape, device=self.device) for i in range(streams)])
            inputs.insert(2, noise)
        noise = initial_noise(seeds, shape, self.dtype, self.device)
        return self.run(image_name(*size), (noise, *inputs))

    @isolated()
    def encode(self, ids: Sequence[Sequence[int]]) -> PromptEmbeds:
        """Return embeddings of prompts given as token ids, which may differ in length.

        Raises ConfigError for a file without text encoder, and for ids and lengths that it does not take.
        """
        text = self.manifest["text"]
        if text is None:
            raise ConfigError("this file has no text encoder; export it with --text-encoder")
        most, dropped = text["max_tokens"], text["dropped"]
        rows = [items(row) for row in items(ids) or ()]
        if not rows or any(row is None or not dropped < len(row) <= most for row in rows):
            raise ConfigError(f"prompts must be lists of {dropped + 1} to {most} token ids; got {shown(ids)}")
        checked = [[check_integer("token ids", i, 0, text["vocabulary"] - 1) for i in row or ()] for row in rows]
        longest = max(text["least_tokens"], *map(len, checked))
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in checked], device=self.device)
        return PromptEmbeds(self.run(TEXT, (padded,)), tuple(len(row) - dropped for row in checked))

    def run(self, program: str, inputs: Sequence[Tensor]) -> Tensor:
        """Return the output of one program. inputs: as for `program.Generate` or `program.Encode`, unchecked: wrong
        ones may end the process."""
        if program not in self._programs:
            self._programs[program] = self._load(program)
        output: Tensor
        (output,) = self._programs[program].boxed_run([x.contiguous() for x in inputs])
        return output

    def _load(self, name: str) -> Any:
        """Load a program's code and give it its weights, which programs share."""
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(str(self.archive.path), name, False, 1, -1)
        except RuntimeError as error:
            if "temporary directory" not in str(error):
                raise
            raise StorageError(
                "torch unpacks a program's code in the folder for temporary files, which cannot be written: set TMPDIR"
            ) from error
        constants = {}
        for constant, key in self.manifest["programs"][name]["constants"].items():
            if key not in self._weights:
                self._weights[key] = self.archive.weight(key).to(self.device)
            constants[constant] = self._weights[key]
        loader.load_constants(constants, False, True, True)  # checked to be all; borrowed, not copied
        return loader

    def _padded(self, prompt: PromptEmbeds) -> tuple[Tensor, Tensor]:
        """Return embeddings with as many rows as the programs take, and lengths, int64 [B]."""
        if not isinstance(prompt, PromptEmbeds):
            raise ConfigError(f"prompt must be PromptEmbeds, as Pipeline.text and encode give; got {shown(prompt)}")
        rule, shape = self.manifest["prompt"], tuple(prompt.embeds.shape)
        lengths, longest = prompt.lengths, max(prompt.lengths, default=0)
        if len(shape) != 3 or shape[2] != rule["width"] or len(lengths) != shape[0] or not 0 < longest <= shape[1]:
            raise ConfigError(
                f"prompt embeddings of shape {shape} and lengths {lengths} do not fit: this model "
                f"takes [B, L, {rule['width']}] and B lengths from 1 to L"
            )
        if longest > rule["max_tokens"] or min(lengths) < (rule["fixed"] or 1):
            wanted = f"exactly {rule['fixed']}" if rule["fixed"] else f"1 to {rule['max_tokens']}"
            raise ConfigError(f"prompts of {min(lengths)} to {longest} rows; this model takes {wanted}")
        wanted = -(-longest // rule["multiple"]) * rule["multiple"]
        embeds = prompt.embeds.to(self.device, self.dtype)[:, :wanted]
        return F.pad(embeds, (0, 0, 0, wanted - embeds.shape[1])), torch.tensor(lengths, device=self.device)

    def _extra(self, prompt: PromptEmbeds, name: str, width: int) -> Tensor:
        """Return the prompt's further input `name`, [B, width]."""
        if name not in prompt.extras or prompt.extras[name].shape != (len(prompt), width):
            raise ConfigError(f"this model takes prompts with {name!r} of shape [B, {width}]")
        return prompt.extras[name].to(self.device, self.dtype)


def check_machine(manifest: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError where this torch or processor cannot run the compiled code."""
    made, here = (".".join(re.findall(r"\d+", v)[:2]) for v in (manifest["torch"], torch.__version__))
    if made != here:
        raise CheckpointError(f"{path} was compiled by torch {made}, this is {here}; export it again here")
    needs, has = manifest["cpu"], torch.backends.cpu.get_cpu_capability()
    if manifest["device"] == "cpu" and needs != has and not (
        needs in CPUS and has in CPUS and CPUS.index(needs) < CPUS.index(has)
    ):  # fmt: skip
        raise CheckpointError(f"{path} was compiled for processors with {needs}, this one has {has}; export it here")
