"""SD3.5's text stage: two CLIP towers and, if the model folder has it, T5."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.files import read_json
from ..models.text_encoders import clip_text, t5
from .stage import Stage, open_part
from .text import PromptEmbeds, check_vocabulary
from .tokenizer import PaddingTokenizer


class SD3Text(Stage):
    """prompts -> embeddings [B, 77 + 256, width] and their pooled form [B, P], as in diffusers' pipeline.

    CLIP's 77 tokens (features of both towers side by side, then zeros up to `width`) come first, T5's
    256 after them. T5 is most of the model's memory and optional: where model_index.json has
    `"text_encoder_3": [null, null]`, as diffusers saves a pipeline without it, its tokens are zeros
    and its files are not needed. `width` is then set by whoever knows it (`Family.fit`).
    """

    max_tokens = 256

    def __init__(self, folder: Path) -> None:
        entry = read_json(folder / "model_index.json").get("text_encoder_3", True)
        self.has_t5 = entry is not None and entry != [None, None]
        kinds = [("", clip_text.MODEL), ("_2", clip_text.MODEL)] + [("_3", t5.MODEL)] * self.has_t5
        self.tokenizers = tuple(PaddingTokenizer(folder / f"tokenizer{suffix}") for suffix, _ in kinds)
        self.parts = tuple(open_part(folder / f"text_encoder{suffix}", model) for suffix, model in kinds)
        for tokenizer, part in zip(self.tokenizers, self.parts, strict=True):
            check_vocabulary(tokenizer, part)
        configs = [part.network.config for part in self.parts]
        self.clip_width = sum(config.hidden_size for config in configs[:2])
        self.pooled_width = sum(config.projection_dim for config in configs[:2])
        self.width = configs[2].d_model if self.has_t5 else self.clip_width

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        device = self.parts[0].network.text_projection.weight.device
        lengths = [part.network.config.max_position_embeddings for part in self.parts[:2]] + [self.max_tokens]
        ids = [
            torch.tensor(tokenizer(prompts, length), device=device)
            for tokenizer, length in zip(self.tokenizers, lengths, strict=False)
        ]

        def run(*ids: Tensor) -> PromptEmbeds:
            return self._embed([part.network for part in self.parts], ids)

        embeds: PromptEmbeds = self.captured("text", run, *ids)
        return embeds

    def probe(self, tokens: int, networks: Sequence[Any] = ()) -> PromptEmbeds:
        """The stage's work for one prompt, which is the same at any length, on the meta device: to be counted.
        networks: of its parts, made if not given."""
        lengths = [part.network.config.max_position_embeddings for part in self.parts[:2]] + [self.max_tokens]
        ids = [torch.zeros(1, n, dtype=torch.int64, device="meta") for n in lengths[: len(self.parts)]]
        return self._embed(networks or self.meta_networks(), ids)

    def _embed(self, networks: Sequence[Any], ids: Sequence[Tensor]) -> PromptEmbeds:
        states, pooled = zip(*(network(i) for network, i in zip(networks[:2], ids[:2], strict=True)), strict=True)
        clip = F.pad(torch.cat(states, -1), (0, self.width - self.clip_width))
        far = networks[2](ids[2]) if self.has_t5 else clip.new_zeros(len(clip), self.max_tokens, self.width)
        embeds = torch.cat((clip, far), 1)
        return PromptEmbeds(embeds, (embeds.shape[1],) * len(embeds), {"pooled": torch.cat(pooled, -1)})
