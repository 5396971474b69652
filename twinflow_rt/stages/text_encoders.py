"""The text stages of single families: how each writes its prompts, and what it makes of its encoders' states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.checkpoint import Files
from ..checkpoint.files import read_json
from ..errors import CheckpointError
from ..models.architecture import Architecture
from ..models.text_encoders.language_model import Past, embed
from .chat_template import chat_template
from .stage import open_part
from .text import PromptEmbeds, TextEncoder, TextStage, check_vocabulary
from .tokenizer import PaddingTokenizer, Tokenizer

# SANA's "complex human instruction" (arXiv 2410.10629), word for word: the model was trained with it
INSTRUCTION = "\n".join((
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
    "image generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
    "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
    "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
    "skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional "
    "commentary or evaluations:",
    "User Prompt: ",
))  # fmt: skip


class QwenImageTokenizer(Tokenizer):
    """Prompts within the fixed instruction that Qwen-Image was trained with."""

    SYSTEM = (
        "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
        "of the objects and background:"
    )

    def render(self, prompt: str) -> str:
        turns = f"<|im_start|>system\n{self.SYSTEM}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
        return turns + "<|im_start|>assistant\n"


class Flux2Tokenizer(PaddingTokenizer):
    """Prompts as one user turn of the folder's chat template, thinking off."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.template = chat_template(folder, thinking=False)

    def render(self, prompt: str) -> str:
        return self.template(prompt)


class Flux2Text(TextEncoder):
    """Prompts of 512 tokens, padding included, to several of the model's states side by side [B, 512, width].

    FLUX.2 reads the states of padding as well, so all are computed, as in diffusers' Flux2KleinPipeline."""

    def __init__(self, folder: Path, model: Architecture, files: Files) -> None:
        super().__init__(folder, model, Flux2Tokenizer, files, max_tokens=512)
        self.width = self.network.config.width

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        own = Tokenizer.__call__(self.tokenizer, prompts, self.max_tokens)
        ids = torch.tensor(self.tokenizer(prompts, self.max_tokens), device=self.device)
        counts = torch.tensor([len(one) for one in own], device=self.device)
        states: Tensor = self.captured("text", lambda ids, counts: self.network(ids, None, counts), ids, counts)
        return PromptEmbeds(states, (self.max_tokens,) * len(prompts))

    def probe(self, tokens: int, networks: Sequence[Any] = ()) -> PromptEmbeds:
        """As every text stage's; the work is the same at any length of a prompt."""
        (network,) = networks or self.meta_networks()
        ids = torch.zeros(1, self.max_tokens, dtype=torch.int64, device="meta")
        return PromptEmbeds(network(ids, None, ids[:, 0]), (self.max_tokens,))


class SanaTokenizer(Tokenizer):
    """Prompts in lower case behind SANA's instruction."""

    def render(self, prompt: str) -> str:
        return INSTRUCTION + prompt.lower().strip()


class SanaText(TextEncoder):
    """Prompts to the embeddings of the instruction's first token and of those from its last on, at most 300.

    As in diffusers' SanaPipeline, but for padding: that pads to 300 tokens and masks, here a prompt has its own length.
    """

    def __init__(self, folder: Path, model: Architecture, files: Files) -> None:
        super().__init__(folder, model, SanaTokenizer, files, max_tokens=300)
        self.tokenizer.core.no_truncation()
        self.dropped = len(self.tokenizer.core.encode(INSTRUCTION).ids) - 2  # all but its first and last token

    def kept(self, states: Tensor) -> Tensor:
        return torch.cat((states[:, :1], states[:, 1 + self.dropped :]), 1)

    def encode_negative(self, prompts: Sequence[str]) -> PromptEmbeds:
        """As in diffusers, without the instruction."""
        core = self.tokenizer.core
        ids = [core.encode(prompt.lower().strip()).ids[: self.max_tokens] for prompt in prompts]
        return PromptEmbeds(self._states(self.padded(ids, 0), None), tuple(map(len, ids)))


class OpenUniTokenizer(Tokenizer):
    """Prompts in a user turn that asks for an image, and the token that begins one."""

    def render(self, prompt: str) -> str:
        turn = f"<|im_start|>user\nGenerate an image: {prompt}<|im_end|>\n<|im_start|>assistant\n"
        return turn + "<img>"


class OpenUniText(TextEncoder):
    """Prompts to embeddings [B, Q, width] of Q learned queries, as in TwinFlow's OpenUni.

    A language model reads the prompt and the queries behind it; the connector makes embeddings of its states there.
    OpenUni pads, masks and renumbers the prompts of a batch before the queries; here the queries follow each prompt's
    own last token, which is the same.
    """

    def __init__(self, folder: Path, model: Architecture, connector: Architecture, files: Files) -> None:
        super().__init__(folder, model, OpenUniTokenizer, files, max_tokens=0)
        part = open_part(folder / "connector", connector, files)
        self.parts += (part,)
        self.connector = part.network
        inner, outer = self.network.config.hidden_size, self.connector.config.hidden_size
        if inner != outer:
            raise CheckpointError(
                f"text_encoder hidden_size {inner} does not fit the connector's hidden_size {outer}: parts of "
                "two models"
            )
        self.width = self.connector.config.caption_channels
        self.max_tokens = self.network.config.positions - self.connector.config.num_queries
        if self.max_tokens < 1:
            raise CheckpointError(
                f"text_encoder max_position_embeddings {self.network.config.positions} leave no room for a prompt "
                f"before the connector's {self.connector.config.num_queries} queries; download both again"
            )

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        ids = self.tokenizer(prompts, self.max_tokens)
        prefix = self.prefix(ids)
        start = 0 if prefix is None else len(prefix.ids)
        padded = self.padded(ids, start)
        lengths = torch.tensor([len(i) - start for i in ids], device=padded.device)

        def run(ids: Tensor, lengths: Tensor) -> PromptEmbeds:
            past = None if prefix is None else prefix.past
            return self._embed(self.network, self.connector, ids, lengths, past)

        embeds: PromptEmbeds
        if prefix is None:
            embeds = self.captured("text", run, padded, lengths)
        else:
            embeds = self.captured("text after prefix", run, padded, lengths, owner=prefix)
        return embeds

    def probe(self, tokens: int, networks: Sequence[Any] = ()) -> PromptEmbeds:
        language, connector = networks or self.meta_networks()
        start = self.shared(tokens)
        ids, lengths = (torch.zeros(*shape, dtype=torch.int64, device="meta") for shape in ((1, tokens - start), (1,)))
        return self._embed(language, connector, ids, lengths, language.blank_past(start) if start else None)

    def _embed(
        self, language: Any, connector: Any, ids: Tensor, lengths: Tensor, past: Past | None
    ) -> PromptEmbeds:
        """Return the embeddings of prompts ids [B, L], of which prompt b's first lengths[b] tokens count. past: of the
        tokens before them."""
        queries, count = connector.meta_queries, connector.config.num_queries
        x = F.pad(embed(ids, language.embed_tokens.weight), (0, 0, 0, count))
        prompts = torch.arange(len(ids), device=ids.device)[:, None]
        at = lengths[:, None] + torch.arange(count, device=ids.device)
        x = x.index_put((prompts, at), queries.to(x.dtype))
        states = language.encode(x, past)[prompts, at]
        return PromptEmbeds(connector(states), (count,) * len(ids))


class SD3Text(TextStage):
    """Prompts to embeddings [B, 77 + 256, width] and their pooled form [B, pooled_width], as in diffusers' pipeline.

    CLIP's 77 tokens (features of both towers side by side, then zeros up to `width`) come first, T5's 256 after them.
    T5 is most of the model's memory and optional: where model_index.json has `"text_encoder_3": [null, null]`, as
    diffusers saves a pipeline without it, its tokens are zeros and its files are not needed.

    clip, t5: the architectures of the encoders. width: of the embeddings, as the network reads them. clip_width,
    t5_width: features that the encoders have, the latter None without T5.
    """

    def __init__(self, folder: Path, clip: Architecture, t5: Architecture, width: int, files: Files) -> None:
        entry = read_json(folder / "model_index.json").get("text_encoder_3", True)
        has_t5 = entry is not None and entry != [None, None]
        models = {"": clip, "_2": clip} | ({"_3": t5} if has_t5 else {})
        self.tokenizers = tuple(PaddingTokenizer(folder / f"tokenizer{suffix}") for suffix in models)
        parts = (open_part(folder / f"text_encoder{suffix}", model, files) for suffix, model in models.items())
        self.parts = tuple(parts)
        for tokenizer, part in zip(self.tokenizers, self.parts, strict=True):
            check_vocabulary(tokenizer, part)
        configs = [part.network.config for part in self.parts]
        self.max_tokens, self.width = 256, width
        self.clip_width = sum(config.hidden_size for config in configs[:2])
        self.pooled_width = sum(config.projection_dim for config in configs[:2])
        self.t5_width: int | None = configs[2].d_model if has_t5 else None

    @property
    def _lengths(self) -> list[int]:
        """Tokens that each encoder reads."""
        towers = [part.network.config.max_position_embeddings for part in self.parts[:2]]
        return [*towers, self.max_tokens][: len(self.parts)]

    def readers(self) -> Sequence[tuple[str, Tokenizer, int]]:
        names = (part.name for part in self.parts)
        return list(zip(names, self.tokenizers, self._lengths, strict=True))

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        device = self.parts[0].network.text_projection.weight.device
        ids = [torch.tensor(tokenizer(prompts, length), device=device) for _, tokenizer, length in self.readers()]

        def run(*ids: Tensor) -> PromptEmbeds:
            return self._embed([part.network for part in self.parts], ids)

        embeds: PromptEmbeds = self.captured("text", run, *ids)
        return embeds

    def probe(self, tokens: int, networks: Sequence[Any] = ()) -> PromptEmbeds:
        """As every text stage's; the work is the same at any length of a prompt."""
        ids = [torch.zeros(1, n, dtype=torch.int64, device="meta") for n in self._lengths]
        return self._embed(networks or self.meta_networks(), ids)

    def _embed(self, networks: Sequence[Any], ids: Sequence[Tensor]) -> PromptEmbeds:
        states, pooled = zip(*(network(i) for network, i in zip(networks[:2], ids[:2], strict=True)), strict=True)
        clip = F.pad(torch.cat(states, -1), (0, self.width - self.clip_width))
        absent = self.t5_width is None
        t5 = clip.new_zeros(len(clip), self.max_tokens, self.width) if absent else networks[2](ids[2])
        embeds = torch.cat((clip, t5), 1)
        return PromptEmbeds(embeds, (embeds.shape[1],) * len(embeds), {"pooled": torch.cat(pooled, -1)})
