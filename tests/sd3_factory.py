"""Tiny SD3.5 networks with random weights: diffusers' own as the oracle, and ours beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.factory import randomize
from twinflow_rt.models.sd3 import FUSED, SD3Config, SD3Transformer
from twinflow_rt.passes.fuse import merge

SMALL = SD3Config(
    sample_size=8, in_channels=4, num_layers=3, attention_head_dim=6, num_attention_heads=2, joint_attention_dim=20,
    caption_projection_dim=12, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=9,
    dual_attention_layers=(0, 1),
)  # fmt: skip
# (latent height, width, batch, prompt tokens)
SHAPES = ((8, 8, 1, 7), (2, 14, 2, 1), (10, 6, 3, 9))


class TwinFlowReference(nn.Module):
    """diffusers' network; its conditioning replaced by TwinFlow's formula, term by term."""

    def __init__(self, config: SD3Config = SMALL, seed: int = 1) -> None:
        super().__init__()
        from diffusers import SD3Transformer2DModel
        from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

        raw = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        self.network = randomize(SD3Transformer2DModel(**raw), seed)
        # positions are read from the checkpoint, so let them be any
        self.network.pos_embed.pos_embed.normal_(generator=torch.Generator().manual_seed(seed))
        self.second = randomize(CombinedTimestepTextProjEmbeddings(config.dim, config.pooled_projection_dim), seed + 1)

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint of a TwinFlow model."""
        second = {f"time_text_embed_2.{k}": v for k, v in self.second.state_dict().items()}
        return {**self.network.state_dict(), **second}

    @torch.no_grad()
    def velocity(self, latents: Tensor, embeds: Tensor, pooled: Tensor, t: float, tt: float | None = None) -> Tensor:
        """diffusers' prediction; tt=None: without the second embedder's term."""
        handles = []
        if tt is not None:

            def add_second(module, args, output):
                timestep, pooled = args
                target = torch.full_like(timestep, tt * 1000)
                return output + self.second(target, pooled) * ((timestep - target)[:, None] / 1000)

            handles.append(self.network.time_text_embed.register_forward_hook(add_second))
        timestep = torch.full((len(latents),), t * 1000, dtype=latents.dtype)
        try:
            return self.network(latents, embeds, pooled, timestep, return_dict=False)[0]
        finally:
            for handle in handles:
                handle.remove()


def ours(tensors: dict[str, Tensor], config: SD3Config = SMALL) -> SD3Transformer:
    """Our unfolded network with a checkpoint's tensors."""
    network = SD3Transformer(config)
    network.load_state_dict(merge(tensors, FUSED), assign=True)
    return network.eval()


def inputs(shape, config: SD3Config = SMALL, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, prompt embeddings, pooled prompts."""
    height, width, batch, tokens = shape
    g = torch.Generator().manual_seed(height * width)
    latents = torch.randn(batch, config.in_channels, height, width, generator=g)
    embeds = torch.randn(batch, tokens, config.joint_attention_dim, generator=g)
    pooled = torch.randn(batch, config.pooled_projection_dim, generator=g)
    return latents.to(dtype), embeds.to(dtype), pooled.to(dtype)


def context_of(network: SD3Transformer, args):
    _, embeds, pooled = args
    return network.encode_context(embeds, (embeds.shape[1],) * len(embeds), pooled=pooled)


@torch.no_grad()
def run(network: SD3Transformer, args, t: float, tt: float) -> Tensor:
    """The unfolded network at (t, tt)."""
    context = context_of(network, args)
    times = (torch.tensor([v], dtype=torch.float64) for v in (t, tt))
    return network(args[0], network.modulate(*times, context), context)


@torch.no_grad()
def run_step(network: SD3Transformer, args, step: int) -> Tensor:
    """A folded network at its evaluation `step`."""
    return network(args[0], network.step_modulation(step), context_of(network, args))
