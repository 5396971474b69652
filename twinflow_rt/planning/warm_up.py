"""Attention backends that plan once per shape (cuDNN, tens to hundreds of milliseconds) plan before a user waits.

Which shapes a network asks for is not computed but seen: a copy of it runs on the meta device, on the op that
writes them down. Prompts are taken at multiples of 32 tokens: Z-Image pads its prompts to these, SD3.5's and
OpenUni's have one length. Prompts of Qwen-Image and SANA keep their own length
where the network is not recorded as a graph (padding would need a mask, which costs every image more than planning
costs the first of a length). A plan for each length would hold up loading, so there a prompt of a new length plans
anew, unless all lengths up to one were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.context import BUCKET
from ..ops import EAGER
from ..ops.backends import PLANS_PER_SHAPE, warm_up
from ..ops.selection import Choice
from ..stages.text import TextStage
from ..stages.vae import VaeDecoder
from .meta_model import MetaModel

TOKENS = 128  # prompts up to this length are prepared for unasked

Shape = tuple[int, int, int, int, int]  # batch, queries, keys, heads, head dim


def plans_per_shape(choices: Sequence[Choice]) -> bool:
    """Return whether the attention that was chosen has to be warmed up."""
    return any(choice.op == "attention" and choice.chosen in PLANS_PER_SHAPE for choice in choices)


def prompt_lengths(most: int) -> tuple[int, ...]:
    """Return the padded lengths of prompts of up to `most` tokens."""
    return (*range(BUCKET, most, BUCKET), most)


def keeps_lengths(model: MetaModel) -> bool:
    """Return whether attention is called with every length that prompts have, not with a few."""
    one, other = (attention_shapes(model, [length]) for length in (1, 2))
    return one != other


def attention_shapes(model: MetaModel, lengths: Sequence[int]) -> tuple[Shape, ...]:
    """Return the (batch, queries, keys, heads, head_dim) of every dense attention call for the model's images, with
    prompts of `lengths` tokens."""
    seen: dict[Shape, None] = {}

    def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            seen[q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3]] = None
        return q.flatten(2)

    images = len(model.latents)
    model.network.ops = replace(EAGER, attention=attention)
    with torch.inference_mode():
        for length in lengths:
            prompt = model.prompt(length)
            for prompts in dict.fromkeys((1, images)):  # one for all, or one each
                context = model.encode(prompt.select([0] * prompts))
                model.velocity(context.select([0] * images))
    return tuple(seen)


def warm(
    text: TextStage, network: Any, vae: VaeDecoder, choices: Sequence[Choice], size: tuple[int, int], images: int,
    tokens: int | None, dtype: torch.dtype, device: torch.device,
) -> int:  # fmt: skip
    """Have the chosen attention plan for `attention_shapes` of prompts of up to `tokens` tokens (None: of `TOKENS`, and
    of none where prompts keep their lengths). Return the number of shapes, 0 where nothing plans."""
    if not plans_per_shape(choices):
        return 0
    model = MetaModel.of(text, network, vae, size, images)
    each = keeps_lengths(model)
    if each and tokens is None:
        return 0
    most = min(TOKENS if tokens is None else tokens, text.max_tokens)
    shapes = attention_shapes(model, range(1, most + 1) if each else prompt_lengths(most))
    return warm_up(network.ops.attention, shapes, dtype, device)
