"""The demo's tokenizer and text encoder: byte-level BPE and a three-layer Qwen3, as Z-Image's in small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .scenes import COLORS, RELATIONS, SHAPES, Scene, sample_scene
from .trainer import Trainer, TrainerConfig

VOCABULARY = 512
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen's chat form; `enable_thinking` is accepted and changes nothing, as in Qwen3 with thinking on
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def build_tokenizer(seed: int) -> object:
    """Learn a byte-level BPE of 512 tokens from training captions; any string can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
        """Return ids [N, 32] int64 and lengths [N] int64."""
        chats = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for text in texts
        ]
        batch = self.tokenizer(chats, padding="max_length", max_length=32, truncation=False, return_tensors="pt")
        return batch.input_ids, batch.attention_mask.sum(1)


def build_text_encoder(vocab: int, width: int) -> nn.Module:
    """Return a Qwen3Model of three layers; prompt_embeds are what enters its last (hidden_states[-2])."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=512,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return Qwen3Model(config)


# what a caption asks for, as classes: shape and colour of the first and the second object, relation, count
CLASSES = (len(SHAPES), len(COLORS) + 1, len(SHAPES) + 1, len(COLORS) + 1, len(RELATIONS) + 1, 4)


def describe(scene: Scene) -> list[int]:
    """Return the scene's class in each of CLASSES; the last class of a colour, shape or relation is "not named"."""
    first, second = (*scene.required, None)[:2]
    classes = []
    for asked in (first, second):
        classes.append(SHAPES.index(asked.shape) if asked else len(SHAPES))
        classes.append(list(COLORS).index(asked.color) if asked and asked.color else len(COLORS))
    relation = list(RELATIONS).index(scene.relation) if scene.relation else len(RELATIONS)
    return [*classes, relation, scene.required[0].count - 1]


class _Reader(nn.Module):
    """Text encoder and a linear probe of its last token, which has seen the whole caption."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.probe = encoder, nn.Linear(encoder.config.hidden_size, sum(CLASSES))

    def loss(self, ids: Tensor, lengths: Tensor, classes: Tensor) -> Tensor:
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        device = self.probe.weight.device
        hidden = self.encoder(
            input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True
        ).hidden_states[-2]
        logits = self.probe(hidden[torch.arange(len(ids)), lengths - 1]).split(CLASSES, 1)
        columns = classes.to(device).unbind(1)
        return torch.stack([nn.functional.cross_entropy(a, b) for a, b in zip(logits, columns, strict=True)]).sum()


def pretrain_text_encoder(
    encoder: nn.Module, tokenizer: object, out: Path, steps: int, seed: int, log: Callable[[str], None]
) -> None:
    """Teach `encoder` in place to classify captions by what they ask for (see `describe`), in folder `out`.

    Without it the encoder learns grammar through the velocity loss alone: slowly, and two-object captions last.
    """
    rng, captions = np.random.default_rng(seed), Captions(tokenizer)
    scenes = [sample_scene(rng) for _ in range(8192)]
    ids, lengths = captions.tokenize([s.caption for s in scenes])
    classes = torch.tensor([describe(s) for s in scenes])

    def loss(model: _Reader, *_: object) -> tuple[Tensor, dict[str, Tensor]]:
        i = torch.randint(len(ids), (128,))
        longest = int(lengths[i].max())
        return model.loss(ids[i, :longest], lengths[i], classes[i]), {}

    config = TrainerConfig(steps=steps, lr=2e-3, ema=0.98, seed=seed, warmup=50)
    reader = _Reader(encoder).to(encoder.device)
    encoder.load_state_dict(Trainer("text", reader, loss, config, out, log).run().encoder.state_dict())
