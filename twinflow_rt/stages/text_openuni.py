"""OpenUni's text stage: a language model reads the prompt, learned queries behind it take SANA's place for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from ..models.text_encoders import openuni
from ..models.text_encoders.language_model import Past
from .stage import open_part
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
        connector = open_part(folder / "connector", openuni.CONNECTOR)
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
        """Do the stage's work for one prompt of `tokens` tokens on the meta device, to be counted. networks:
        `meta_networks()`, made if not given."""
        language, connector = networks or self.meta_networks()
        start = self.shared(tokens)
        ids, lengths = (torch.zeros(*shape, dtype=torch.int64, device="meta") for shape in ((1, tokens - start), (1,)))
        return self._embed(language, connector, ids, lengths, language.blank_past(start) if start else None)

    def _embed(
        self, language: Any, connector: Any, ids: Tensor, lengths: Tensor, past: Past | None
    ) -> PromptEmbeds:
        """ids: [B, L], of which prompt b's first lengths[b] count; past: of the tokens before them."""
        queries, count = connector.meta_queries, connector.config.num_queries
        x = F.pad(F.embedding(ids, language.embed_tokens.weight), (0, 0, 0, count))
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        at = lengths[:, None] + torch.arange(count, device=ids.device)
        x = x.index_put((rows, at), queries.to(x.dtype))
        states = language.encode(x, past)[rows, at]
        return PromptEmbeds(connector(states), (count,) * len(ids))
