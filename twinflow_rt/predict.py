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
        velocity = type(network)(network.config, folded_steps=1)
        latents = torch.zeros(1, vae.channels, height // vae.scale, width // vae.scale)
    with torch.no_grad():
        prompt = text.probe(PROMPT_TOKENS)

    def encode() -> Any:
        return velocity.encode_context(prompt.embeds, prompt.lengths, **prompt.extras)

    with torch.no_grad():
        context = encode()
    prompt_bytes = sum(parameter_bytes(network.get_submodule(name)) for name in network.prompt_modules)
    text_bytes, vae_bytes = (sum(parameter_bytes(p.network) for p in stage.parts) for stage in (text, vae))
    velocity_bytes = parameter_bytes(network) - prompt_bytes
    return (
        Stage("text", count_flops(lambda: text.probe(PROMPT_TOKENS)), text_bytes),
        Stage("context", count_flops(encode), prompt_bytes),
        Stage("velocity", count_flops(lambda: velocity(latents, velocity.step_modulation(0), context)), velocity_bytes),
        Stage("decode", count_flops(lambda: vae.probe(height, width)), vae_bytes),
    )
