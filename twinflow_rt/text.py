"""The first stage: prompts to embeddings, each prompt at its own length.

Prompts go through the model's chat template (one user turn, generation prompt added, thinking on) as
in diffusers' ZImagePipeline, but are padded to the longest of the batch instead of 512 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, ConfigError
from .models.qwen3 import FUSED, Qwen3Config, Qwen3Encoder
from .passes.fuse import split
from .passes.load import Checkpoint, Layout, LoadReport, Progress, materialize, read_json

MAX_TOKENS = 512  # longer prompts lose their tail, as in the reference


@dataclass(frozen=True)
class PromptEmbeds:
    """embeds: [B, L, D]; prompt b's first lengths[b] rows count, the others hold anything finite."""

    embeds: Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)


class ChatTokenizer:
    """Token ids of prompts in chat form, from tokenizer.json and its chat template.

    Uses the `tokenizers` library directly: importing transformers would cost seconds of start-up.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; save the tokenizer with its fast (tokenizers) form")
        try:
            self.core = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer ({error}); download it again") from None
        self.template = _chat_template(folder)

    def __call__(self, prompts: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
        """Ids of each prompt, at most `max_tokens` (the tail is cut)."""
        texts = [self._chat(prompt) for prompt in prompts]
        self.core.no_padding()
        self.core.enable_truncation(max_tokens)
        return [encoding.ids for encoding in self.core.encode_batch(texts)]

    def _chat(self, prompt: str) -> str:
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": prompt}]
        try:
            return self.template.render(messages=messages, add_generation_prompt=True, enable_thinking=True)
        except TemplateError as error:
            raise CheckpointError(f"the model's chat template failed: {error}") from None


def _chat_template(folder: Path) -> Any:
    """The compiled chat template, in a sandbox: templates are code from the checkpoint."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config, file = read_json(folder / "tokenizer_config.json"), folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((t["template"] for t in source if t.get("name") == "default"), None)
    if not isinstance(source, str):
        raise CheckpointError(f"{folder} has no chat template; Z-Image prompts are written in chat form")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"{folder}: the chat template does not compile ({error})") from None


def layout(config: Qwen3Config) -> Layout:
    """The language-model head, the last layer and the closing norm feed nothing here; norms stay float32."""
    unused = ("lm_head.", f"layers.{config.depth - 1}.", "norm.")
    return Layout(FUSED, unused, lambda name, dtype: torch.float32 if "norm" in name else dtype)


class TextEncoder:
    """prompts -> PromptEmbeds."""

    def __init__(self, tokenizer: ChatTokenizer, network: Qwen3Encoder, max_tokens: int = MAX_TOKENS) -> None:
        self.tokenizer, self.network, self.max_tokens = tokenizer, network, max_tokens

    @classmethod
    def load(
        cls, folder: Path, tokenizer: Path, device: torch.device, dtype: torch.dtype, progress: Progress | None = None
    ) -> tuple[TextEncoder, LoadReport]:
        """Reads the encoder in `folder` and the tokenizer in `tokenizer`."""
        chat = ChatTokenizer(tokenizer)
        checkpoint = Checkpoint(folder, strip="model.")
        config = Qwen3Config.from_dict(checkpoint.config)
        if chat.core.get_vocab_size() > config.vocab_size:
            raise CheckpointError(
                f"{tokenizer} knows {chat.core.get_vocab_size()} tokens, {folder} embeds {config.vocab_size}; "
                "they belong to different models"
            )
        with torch.device("meta"):
            network = Qwen3Encoder(config)
        report = materialize(network, checkpoint, layout(config), device, dtype, progress)
        return cls(chat, network), report

    def weights(self) -> dict[str, Tensor]:
        """The encoder's tensors under the checkpoint's names (of those layers that are used)."""
        config = self.network.config
        heads = (config.heads, config.kv_heads, config.kv_heads)
        rows = {"self_attn.qkv_proj.weight": tuple(n * config.head_dim for n in heads)}
        return split(self.network.state_dict(), FUSED, rows)

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings [B, L, D] in the weights' dtype, L the longest prompt's token count."""
        ids = self.tokenizer(prompts, self.max_tokens)
        lengths = tuple(len(i) for i in ids)
        if min(lengths, default=0) == 0:
            raise ConfigError("a prompt has no tokens; the chat template must produce at least one")
        longest = max(lengths)
        device = self.network.embed_tokens.weight.device
        padded = torch.tensor([i + [0] * (longest - len(i)) for i in ids], device=device)
        return PromptEmbeds(self.network(padded), lengths)
