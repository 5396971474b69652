"""What each stage of a model must cost, counted without running it: the plan's `stages`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layers import UpsampleConv
from ..passes.blocks import token_tables
from ..passes.layers import QuantizedLinear
from ..stages.text import TextStage
from ..stages.vae import VaeDecoder
from .footprint import work_of
from .meta_model import MetaModel
from .parameters import parameter_bytes
from .roofline import StageWork

PROMPT_TOKENS = 32  # a short prompt in chat form; longer ones cost text and velocity a little more


def predict_stages(
    text: TextStage, network: Any, vae: VaeDecoder, height: int, width: int, dtype: torch.dtype,
    tokens: int = PROMPT_TOKENS,
) -> tuple[StageWork, ...]:  # fmt: skip
    """Return the work of text, context, velocity (one evaluation) and decode for one image of height x width pixels.

    text, network, vae: the stages, loaded or not, whose tensors say how many bytes of weights there are; copies on the
    meta device do the counting. dtype: of activations. tokens: of the prompt.
    """
    model = MetaModel.of(text, network, vae, (height, width))
    encoders = [part.network for part in text.parts]
    pairs = [*zip(encoders, model.encoders, strict=True), (network, model.network), (vae.network, model.decoder)]
    weights = [tensor for _, copy in pairs for tensor in (*copy.parameters(), *copy.buffers())]
    eight_bit = [weight for real, copy in pairs for weight in _eight_bit_weights(real, copy)]
    with torch.inference_mode():
        prompt = model.prompt(tokens)
        context = model.encode(prompt)
    of_prompt = sum(parameter_bytes(network.get_submodule(name)) for name in network.prompt_modules)
    stages = {
        "text": (lambda: model.prompt(tokens), sum(map(_bytes_read, encoders))),
        "context": (lambda: model.encode(prompt), of_prompt),
        "velocity": (lambda: model.velocity(context), parameter_bytes(network) - of_prompt),
        "decode": (model.decode, _bytes_read(vae.network)),
    }
    counted = {name: work_of(run, weights, eight_bit) for name, (run, _) in stages.items()}
    ratio = dtype.itemsize / torch.float32.itemsize  # the meta model is float32
    return tuple(
        StageWork(name, work.flops, stages[name][1], round(ratio * work.moved), work.eight_bit_flops)
        for name, work in counted.items()
    )


def _eight_bit_weights(network: nn.Module, copy: nn.Module) -> Iterator[Tensor]:
    """Yield the copy's weights of layers whose rows have 8 bits or 4 in `network`."""
    for name, layer in network.named_modules():
        if isinstance(layer, QuantizedLinear) and layer.kind != "w4a16":
            yield copy.get_parameter(f"{name}.weight")


def _bytes_read(network: Any) -> int:
    """Return the bytes of weights without a text encoder's token embeddings, of which some rows are read, and without
    the kernels of a decoder that have a folded form."""
    unread: list[Tensor] = [network.get_parameter(name) for name in token_tables(network)]
    unread += [m.weight for m in network.modules() if isinstance(m, UpsampleConv) and m.folded is not None]
    return parameter_bytes(network) - sum(weight.nbytes for weight in unread)
