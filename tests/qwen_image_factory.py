"""Tiny Qwen-Image networks with random weights: diffusers' own as the oracle, and ours beside it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.factory import WEIGHTS, randomize, tokenizer
from twinflow_rt.checkpoint.fuse import merge
from twinflow_rt.models.transformers.qwen_image import FUSED, QwenImageConfig, QwenImageTransformer

SMALL = QwenImageConfig(
    in_channels=16, out_channels=4, num_layers=3, attention_head_dim=24, num_attention_heads=2,
    joint_attention_dim=20, axes_dims_rope=(8, 10, 6),
)  # fmt: skip
VAE = dict(
    base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 4], num_res_blocks=1, temperal_downsample=[False, True, True],
    latents_mean=[0.3, -0.2, 0.1, -0.4], latents_std=[1.5, 0.8, 2.1, 1.2],
)  # fmt: skip
# (latent height, width, prompt lengths of the batch)
SHAPES = ((8, 8, (7,)), (2, 14, (1,)), (10, 6, (9, 9)), (6, 10, (3, 11, 5)))


def add_second(second: nn.Module, tt: float):
    """A hook that adds TwinFlow's term to diffusers' time embedding: e1(t) + (t - tt) e2(tt)."""

    def hook(module, args, output):
        timestep, hidden = args[:2]
        target = torch.full_like(timestep, tt)
        return output + second(target, hidden) * (timestep - target)[:, None]

    return hook


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
            handles.append(self.network.time_text_embed.register_forward_hook(add_second(self.second, tt)))
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


def text_encoder():
    """A whole Qwen2.5-VL, random: language model, vision tower, head."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(
        vocab_size=259, hidden_size=SMALL.joint_attention_dim, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=5, num_key_value_heads=1, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 0]}, tie_word_embeddings=False,
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=SMALL.joint_attention_dim)
    network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return randomize(network, 4)


def autoencoder(**changes):
    from diffusers import AutoencoderKLQwenImage

    return randomize(AutoencoderKLQwenImage(**{**VAE, **changes}), 3)


def make_model(folder: Path) -> Path:
    """A whole TwinFlow-Qwen-Image folder as diffusers saves it, every part tiny and random."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    reference = TwinFlowReference()
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = QwenImagePipeline(scheduler, autoencoder(), text_encoder(), tokenizer(), reference.network)
        pipe.save_pretrained(folder)
    file = folder / "transformer" / WEIGHTS
    save_file({**load_file(file), **reference.tensors()}, file, metadata={"format": "pt"})
    return folder
