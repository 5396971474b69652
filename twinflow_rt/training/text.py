"""The demo's tokenizer and text encoder: byte-level BPE and a three-layer Qwen3, as Z-Image's in small."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

VOCABULARY = 512
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen's chat form; `enable_thinking` is accepted and changes nothing, as in Qwen3 with thinking on
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def build_tokenizer(seed: int) -> object:
    """Learns a byte-level BPE of 512 tokens from training captions; any string can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from .scenes import sample_scene

    rng = np.random.default_rng(seed)
    corpus = [f"user\n{sample_scene(rng).caption}\nassistant\n" for _ in range(4000)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=SPECIAL[0], eos_token=SPECIAL[2], padding_side="right", model_max_length=512
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Captions:
    """Tokenises captions as the pipeline will: chat template, right padding."""

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer = tokenizer

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Returns ids [N, 32] int64 and lengths [N] int64."""
        chats = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for text in texts
        ]
        batch = self.tokenizer(chats, padding="max_length", max_length=32, truncation=False, return_tensors="pt")
        return batch.input_ids, batch.attention_mask.sum(1)


def build_text_encoder(vocab: int, width: int) -> torch.nn.Module:
    """A Qwen3Model of three layers; prompt_embeds are what enters its last (hidden_states[-2])."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=512,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return Qwen3Model(config)
