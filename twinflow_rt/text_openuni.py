"""OpenUni's text stage: a language model reads the prompt, learned queries behind it take SANA's place for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .capture import bucket
from .errors import CheckpointError
from .models import openuni
from .ops import EAGER
from .ops.select import OpTable
from .text import PromptEmbeds, TextEncoder
from .tokenizer import Tokenizer


class OpenUniTokenizer(Tokenizer):
    """One user turn that asks for an image, and the token that begins one."""

    def render(self, prompt: str) -> str:
        turn = f"<|im_start|>user\nGenerate an image: {prompt}<|im_end|>\n<|im_start|>assistant\n"
        return turn + "<img>"


class OpenUniText(TextEncoder):
    """prompts -> embeddings [B, Q, width], Q learned queries, as TwinFlow's OpenUni has them.

    There prompts of a batch are padded, masked and renumbered before the queries; here the queries
    follow each prompt's own last token, which is the same.
    """

    model = openuni.LANGUAGE
    tokenizer_class = OpenUniTokenizer
    max_tokens = 2048

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        connector = openuni.CONNECTOR.open(folder / "connector")
        self.parts += (connector,)
        self.connector = connector.network
        inner, outer = self.network.config.hidden_size, self.connector.config.hidden_size
        if inner != outer:
            raise CheckpointError(
                f"text_encoder hidden_size {inner} does not fit the connector's hidden_size {outer}: parts of "
                "two models"
            )

    @property
    def width(self) -> int:
        """Features of an embedding."""
        return int(self.connector.config.caption_channels)

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        ids, device = self.tokenizer(prompts, self.max_tokens), self.network.embed_tokens.weight.device
        longest = max(len(i) for i in ids)
        if self.captures is not None:
            longest = bucket(longest)
        padded = torch.tensor([i + [0] * (longest - len(i)) for i in ids], device=device)
        lengths = torch.tensor([len(i) for i in ids], device=device)

        def run(ids: Tensor, lengths: Tensor) -> PromptEmbeds:
            return self._embed(self.network, self.connector, ids, lengths)

        embeds: PromptEmbeds = self.captured("text", run, padded, lengths)
        return embeds

    def probe(self, tokens: int, ops: OpTable = EAGER) -> PromptEmbeds:
        """The stage's work for one prompt of `tokens` tokens, on the meta device: to be counted."""
        ids, lengths = (torch.zeros(*shape, dtype=torch.int64, device="meta") for shape in ((1, tokens), (1,)))
        language, connector = (part.shadow(ops) for part in self.parts)
        return self._embed(language, connector, ids, lengths)

    def _embed(self, language: Any, connector: Any, ids: Tensor, lengths: Tensor) -> PromptEmbeds:
        """ids: [B, L], prompt b's first lengths[b] count."""
        queries, count = connector.meta_queries, connector.config.num_queries
        x = F.pad(F.embedding(ids, language.embed_tokens.weight), (0, 0, 0, count))
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        at = lengths[:, None] + torch.arange(count, device=ids.device)
        x = x.index_put((rows, at), queries.to(x.dtype))
        states = language.encode(x)[rows, at]
        return PromptEmbeds(connector(states), (count,) * len(ids))
