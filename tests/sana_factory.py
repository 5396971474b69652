"""Tiny SANA networks with random weights: diffusers' own as the oracle, and ours beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.factory import randomize
from twinflow_rt.models.sana import FUSED, GUIDANCE, SanaConfig, SanaTransformer
from twinflow_rt.passes.fuse import merge

SMALL = SanaConfig(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=4, num_layers=3,
    num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=12, caption_channels=10,
    sample_size=2,
)  # fmt: skip
SPRINT = replace(SMALL, guidance_embeds=True, qk_norm="rms_norm_across_heads")
# (latent height, width, prompt lengths of the batch)
SHAPES = ((4, 4, (7,)), (1, 5, (1,)), (3, 2, (9, 9)), (5, 3, (3, 11, 5)))


class TwinFlowReference(nn.Module):
    """diffusers' network; its time embedding replaced by TwinFlow's formula, term by term."""

    def __init__(self, config: SanaConfig = SMALL, seed: int = 1) -> None:
        super().__init__()
        from diffusers import SanaTransformer2DModel
        from diffusers.models.normalization import AdaLayerNormSingle

        raw = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        self.network = randomize(SanaTransformer2DModel(**raw), seed)
        self.second = None if config.guidance_embeds else randomize(AdaLayerNormSingle(config.dim), seed + 1)

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint of a TwinFlow model, or of SANA-Sprint."""
        second = {} if self.second is None else self.second.state_dict()
        return {**self.network.state_dict(), **{f"time_embed_2.{k}": v for k, v in second.items()}}

    @torch.no_grad()
    def velocity(
        self, latents: Tensor, embeds: Tensor, lengths: Sequence[int], t: float, tt: float | None = None
    ) -> Tensor:
        """diffusers' prediction; tt=None: without the second embedder's term. SANA-Sprint's takes t alone."""
        mask = (torch.arange(embeds.shape[1]) < torch.tensor(lengths)[:, None]).to(latents.dtype)
        time, guidance, handles = torch.full((len(latents),), t, dtype=latents.dtype), None, []
        if self.second is None:
            guidance = torch.full_like(time, GUIDANCE * self.network.config.guidance_embeds_scale)
        else:
            time = time * 1000
        if tt is not None and self.second is not None:

            def add_second(module, args, kwargs, output):
                target = torch.full_like(args[0], tt * 1000)
                gap = (args[0] - target)[:, None] / 1000
                return tuple(a + b * gap for a, b in zip(output, self.second(target, **kwargs), strict=True))

            handles.append(self.network.time_embed.register_forward_hook(add_second, with_kwargs=True))
        try:
            return self.network(latents, embeds, time, guidance, mask, return_dict=False)[0]
        finally:
            for handle in handles:
                handle.remove()


def ours(tensors: dict[str, Tensor], config: SanaConfig = SMALL) -> SanaTransformer:
    """Our unfolded network with a checkpoint's tensors."""
    network = SanaTransformer(config)
    network.load_state_dict(merge(tensors, FUSED), assign=True)
    return network.eval()


def inputs(shape, config: SanaConfig = SMALL, dtype=torch.float32) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    height, width, lengths = shape
    g = torch.Generator().manual_seed(height * width)
    latents = torch.randn(len(lengths), config.in_channels, height, width, generator=g)
    embeds = torch.randn(len(lengths), max(lengths), config.caption_channels, generator=g)
    return latents.to(dtype), embeds.to(dtype), lengths


@torch.no_grad()
def run(network: SanaTransformer, args, t: float, tt: float) -> Tensor:
    """The unfolded network at (t, tt)."""
    latents, embeds, lengths = args
    times = (torch.tensor([v], dtype=torch.float64) for v in (t, tt))
    return network(latents, network.modulate(*times), network.encode_context(embeds, lengths))


@torch.no_grad()
def run_step(network: SanaTransformer, args, step: int) -> Tensor:
    """A folded network at its evaluation `step`."""
    latents, embeds, lengths = args
    return network(latents, network.step_modulation(step), network.encode_context(embeds, lengths))
