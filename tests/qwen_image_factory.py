"""Tiny Qwen-Image networks with random weights: diffusers' own as the oracle, and ours beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.factory import WEIGHTS, randomize
from twinflow_rt.models.qwen_image import FUSED, QwenImageConfig, QwenImageTransformer
from twinflow_rt.passes.fuse import merge

SMALL = QwenImageConfig(
    in_channels=16, out_channels=4, num_layers=3, attention_head_dim=24, num_attention_heads=2,
    joint_attention_dim=20, axes_dims_rope=(8, 10, 6),
)  # fmt: skip
# (latent height, width, prompt lengths of the batch)
SHAPES = ((8, 8, (7,)), (2, 14, (1,)), (10, 6, (9, 9)), (6, 10, (3, 11, 5)))


class TwinFlowReference(nn.Module):
    """diffusers' network; its time embedding replaced by TwinFlow's formula, term by term."""

    def __init__(self, config: QwenImageConfig = SMALL, seed: int = 1) -> None:
        super().__init__()
        from diffusers import QwenImageTransformer2DModel
        from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings

        raw = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        self.network = randomize(QwenImageTransformer2DModel(**raw), seed)
        self.second = randomize(QwenTimestepProjEmbeddings(config.dim), seed + 1)

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint of a TwinFlow model."""
        second = {f"time_text_embed_2.{k}": v for k, v in self.second.state_dict().items()}
        return {**self.network.state_dict(), **second}

    @torch.no_grad()
    def velocity(
        self, latents: Tensor, embeds: Tensor, lengths: Sequence[int], t: float, tt: float | None = None
    ) -> Tensor:
        """diffusers' prediction in latent space; tt=None: without the second embedder's term."""
        b, c, h, w = latents.shape
        packed = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)
        mask = torch.arange(embeds.shape[1]) < torch.tensor(lengths)[:, None]
        handles = []
        if tt is not None:

            def add_second(module, args, output):
                timestep, hidden = args[:2]
                target = torch.full_like(timestep, tt)
                return output + self.second(target, hidden) * (timestep - target)[:, None]

            handles.append(self.network.time_text_embed.register_forward_hook(add_second))
        try:
            out = self.network(
                packed, embeds, mask, torch.full((b,), t, dtype=latents.dtype), [[(1, h // 2, w // 2)]] * b,
                return_dict=False,
            )[0]  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()
        return out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def ours(tensors: dict[str, Tensor], config: QwenImageConfig = SMALL) -> QwenImageTransformer:
    """Our unfolded network with a checkpoint's tensors; norm weights keep the dtype they come in."""
    network = QwenImageTransformer(config)
    network.load_state_dict(merge(tensors, FUSED), assign=True)
    return network.eval()


def inputs(shape, config: QwenImageConfig = SMALL, dtype=torch.float32) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    height, width, lengths = shape
    g = torch.Generator().manual_seed(height * width)
    latents = torch.randn(len(lengths), config.out_channels, height, width, generator=g)
    embeds = torch.randn(len(lengths), max(lengths), config.joint_attention_dim, generator=g)
    return latents.to(dtype), embeds.to(dtype), lengths


@torch.no_grad()
def run(network: QwenImageTransformer, args, t: float, tt: float) -> Tensor:
    """The unfolded network at (t, tt)."""
    latents, embeds, lengths = args
    times = (torch.tensor([v], dtype=torch.float64) for v in (t, tt))
    return network(latents, network.modulate(*times), network.encode_context(embeds, lengths))


@torch.no_grad()
def run_step(network: QwenImageTransformer, args, step: int) -> Tensor:
    """A folded network at its evaluation `step`."""
    latents, embeds, lengths = args
    return network(latents, network.step_modulation(step), network.encode_context(embeds, lengths))


def relative(a: Tensor, b: Tensor) -> float:
    """Largest error over all elements, relative to the largest magnitude."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def save(folder: Path, tensors: dict[str, Tensor], config: QwenImageConfig = SMALL) -> Path:
    """A transformer folder as diffusers saves it."""
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder
