"""What each stage of a loaded model must cost, counted without running it: the plan's `stages`."""

from __future__ import annotations

from typing import Any

import torch

from .plan import Stage, count_flops, parameter_bytes

PROMPT_TOKENS = 32  # a short prompt in chat form; longer ones cost text and velocity a little more


def predict_stages(text: Any, network: Any, vae: Any, height: int, width: int) -> tuple[Stage, ...]:
    """Stages text, context, velocity (one evaluation) and decode for one image of height x width pixels.

    text, network, vae: the loaded stages; copies of their networks on the meta device do the counting.
    """
    with torch.device("meta"):
        encoder = type(text.network)(text.network.config)
        velocity = type(network)(network.config, folded_steps=1)
        decoder = type(vae.network)(vae.network.config)
        ids = torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64)
        embeds = torch.zeros(1, PROMPT_TOKENS, text.network.config.hidden_size)
        latents = torch.zeros(1, network.config.in_channels, height // vae.scale, width // vae.scale)
    context = velocity.encode_context(embeds, (PROMPT_TOKENS,))
    refiner = parameter_bytes(network.context_refiner) + parameter_bytes(network.cap_embedder)
    weights = parameter_bytes(network)
    return (
        Stage("text", count_flops(lambda: encoder(ids)), parameter_bytes(text.network)),
        Stage("context", count_flops(lambda: velocity.encode_context(embeds, (PROMPT_TOKENS,))), refiner),
        Stage("velocity", count_flops(lambda: velocity(latents, velocity.step_modulation(0), context)), weights - refiner),
        Stage("decode", count_flops(lambda: decoder(latents)), parameter_bytes(vae.network)),
    )
