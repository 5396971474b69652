"""Prompt embeddings in a file: what the text stage made, so that generating needs it no more.

A safetensors file with the keys

    prompt_embeds   [B, L, D]    prompt b's first lengths[b] rows count
    lengths         [B] int64
    extras.NAME     [B, ...]     more that some families take (SD3.5: extras.pooled)

and the metadata `format`, `version`, `model`, `family`, `text_encoder` (see `fingerprint`) and `prompts`, the
texts as a JSON list.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.atomic import check_target, replacing
from ..checkpoint.files import open_tensors, parse_json
from ..checkpoint.fuse import sources
from ..checkpoint.tensor_files import read_tensor
from ..checkpoint.versions import refusal
from ..errors import CheckpointError, ConfigError
from ..passes.layers import BESIDE
from .text import PromptEmbeds, TextStage

FORMAT, VERSION = "twinflow_rt.prompt_embeds", "1"
SMALL = 1 << 15  # numbers: tensors up to this size, norm weights mostly, are read for the fingerprint
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Saved:
    """embeds, and which model they were made for: its name, its family, its text stage's fingerprint."""

    embeds: PromptEmbeds
    model: str
    family: str
    text_encoder: str
    prompts: tuple[str, ...]

    def names(self) -> tuple[str, ...]:
        """Return what to call each prompt: its text, where the file has it."""
        return self.prompts or tuple(f"prompt {k}" for k in range(len(self.embeds)))

    def require(self, family: str, text: TextStage, where: str | Path) -> None:
        """Raise ConfigError unless these are embeddings that the text stage `text` of a `family` model makes."""
        if self.family != family:
            raise ConfigError(f"{where} holds embeddings for {self.family}, not for {family}; encode them anew")
        if self.text_encoder != (own := fingerprint(text)):
            raise ConfigError(
                f"{where} was made by another text encoder (of {self.model}: {self.text_encoder[:12]}, this model's "
                f"is {own[:12]}); encode the prompts with this model"
            )


def fingerprint(text: TextStage) -> str:
    """Return a hash that tells text encoders apart without reading them: names and shapes of the tensors in use, and
    the values of those of at most `SMALL` numbers. The same for a model and for a program saved from it."""
    digest = hashlib.sha256()
    for part in text.parts:
        digest.update(part.name.encode())
        checkpoint = part.checkpoint
        mine = (name for name in part.network.state_dict() if not name.endswith(BESIDE))  # quantized or not
        names = sorted(s for name in mine for s in sources(name, part.layout.fused))
        for name in names:
            shape = checkpoint.shape(name)
            digest.update(f"{name}{shape}".encode())
            if math.prod(shape) <= SMALL:
                digest.update(checkpoint.get(name, dtype=torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def write(
    path: str | Path, embeds: PromptEmbeds, *, model: str, family: str, text: TextStage, prompts: Sequence[str] = ()
) -> Path:  # fmt: skip
    """Write embeddings made by the stage `text` of a model; whole or not at all. Raises ConfigError where
    nothing can be written."""
    from safetensors.torch import save_file

    path = Path(path)
    check_target(path, "prompt embeddings")
    tensors = {"prompt_embeds": embeds.embeds, "lengths": torch.tensor(embeds.lengths, dtype=torch.int64)}
    tensors |= {f"extras.{name}": tensor for name, tensor in embeds.extras.items()}
    metadata = {
        "format": FORMAT, "version": VERSION, "model": model, "family": family, "text_encoder": fingerprint(text),
        "prompts": json.dumps(list(prompts), ensure_ascii=False), "truncated": json.dumps(embeds.truncated),
    }  # fmt: skip
    with replacing(path) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata=metadata)
    return path


def read(path: str | Path) -> Saved:
    """Read such a file. Raises CheckpointError for any other."""
    file = open_tensors(Path(path))
    facts = file.metadata() or {}
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds no prompt embeddings (format {facts.get('format')!r:.80}); `twinflow-rt encode` writes them"
        )
    if (found := facts.get("version", "")) != VERSION:
        found = int(found) if found.isdecimal() else found
        raise CheckpointError(refusal(path, found, int(VERSION), "encode the prompts again"))
    try:
        prompts, truncated = parse_json(facts["prompts"]), parse_json(facts.get("truncated", "[]"))
        names = set(file.keys())
        if missing := {"prompt_embeds", "lengths"} - names:
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        strangers = {n for n in names if n not in ("prompt_embeds", "lengths") and not n.startswith("extras.")}
        if strangers or not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"unknown {', '.join(sorted(strangers))}" if strangers else "prompts are no list of texts")
        kinds = {name: file.get_slice(name).get_dtype() for name in names}
        if kinds["lengths"] != "I64" or any(kind not in FLOATS for name, kind in kinds.items() if name != "lengths"):
            raise ValueError(f"dtypes {kinds}")
        lengths = read_tensor(file, "lengths")
        if lengths.ndim != 1:
            raise ValueError(f"lengths has {lengths.ndim} axes")
        extras = {n.removeprefix("extras."): read_tensor(file, n) for n in names if n.startswith("extras.")}
        if not isinstance(truncated, list) or not all(isinstance(one, bool) for one in truncated):
            raise ValueError("truncated is no list of booleans")
        embeds = PromptEmbeds(read_tensor(file, "prompt_embeds"), tuple(lengths.tolist()), extras, tuple(truncated))
        if prompts and len(prompts) != len(embeds):
            raise ValueError(f"{len(prompts)} texts for {len(embeds)} prompts")
        return Saved(embeds, facts["model"], facts["family"], facts["text_encoder"], tuple(prompts))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: no whole file of prompt embeddings ({error}); encode them again") from None
