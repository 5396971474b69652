"""What each stage of a model must cost, counted without running it: the plan's `stages`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layers import UpsampleConv
from ..passes.layers import QuantizedLinear
from ..plan import Stage, parameter_bytes
from .footprint import work_of
from .meta_model import Shadow

PROMPT_TOKENS = 32  # a short prompt in chat form; longer ones cost text and velocity a little more


def predict_stages(
    text: Any, network: Any, vae: Any, height: int, width: int, dtype: torch.dtype, tokens: int = PROMPT_TOKENS
) -> tuple[Stage, ...]:
    """Stages text, context, velocity (one evaluation) and decode for one image of height x width pixels.

    text, network, vae: the stages, loaded or not, whose tensors say how many bytes of weights there are; shadows of
    them do the counting. dtype: of activations. tokens: of the prompt.
    """
    shadow = Shadow.of(text, network, vae, (height, width))
    encoders = [part.network for part in text.parts]
    twins = [*zip(encoders, shadow.encoders, strict=True), (network, shadow.network), (vae.network, shadow.decoder)]
    weights = [tensor for _, twin in twins for tensor in (*twin.parameters(), *twin.buffers())]
    narrow = [weight for real, twin in twins for weight in _narrow(real, twin)]
    with torch.inference_mode():
        prompt = shadow.prompt(tokens)
        context = shadow.encode(prompt)
    of_prompt = sum(parameter_bytes(network.get_submodule(name)) for name in network.prompt_modules)
    stages = {
        "text": (lambda: shadow.prompt(tokens), sum(map(_bytes_read, encoders))),
        "context": (lambda: shadow.encode(prompt), of_prompt),
        "velocity": (lambda: shadow.velocity(context), parameter_bytes(network) - of_prompt),
        "decode": (shadow.decode, _bytes_read(vae.network)),
    }
    counted = {name: work_of(run, weights, narrow) for name, (run, _) in stages.items()}
    ratio = dtype.itemsize / torch.float32.itemsize  # shadows are float32
    return tuple(
        Stage(name, work.flops, stages[name][1], round(ratio * work.moved), work.narrow_flops)
        for name, work in counted.items()
    )


def _narrow(network: nn.Module, shadow: nn.Module) -> Iterator[Tensor]:
    """The shadow's weights of layers that have 8 bits in `network`."""
    for name, layer in network.named_modules():
        if isinstance(layer, QuantizedLinear):
            yield shadow.get_parameter(f"{name}.weight")


def _bytes_read(network: Any) -> int:
    """Bytes of weights without a text encoder's token embeddings, of which some rows are read, and the kernels of a
    decoder that have a folded form."""
    tokens = getattr(network.config, "vocab_size", None)
    unread: list[Tensor] = [p for p in network.parameters() if p.ndim == 2 and p.shape[0] == tokens]
    unread += [m.weight for m in network.modules() if isinstance(m, UpsampleConv) and m.folded is not None]
    return parameter_bytes(network) - sum(weight.nbytes for weight in unread)
