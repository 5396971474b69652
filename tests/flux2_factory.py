"""Tiny FLUX.2-klein networks with random weights: diffusers' own as the oracle, and whole folders."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests import networks
from tests.factory import randomize, tokenizer
from twinflow_rt.models.transformers.flux2 import Flux2Config

SMALL = Flux2Config(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=24, num_attention_heads=2,
    joint_attention_dim=20, axes_dims_rope=(4, 8, 8, 4),
)  # fmt: skip
TEXT_DIM = 8
VAE = dict(
    block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, sample_size=64,
)  # fmt: skip
# (latent height, width, prompt lengths of the batch, all alike)
SHAPES = ((8, 8, (7,)), (3, 5, (1,)), (5, 3, (9, 9)))


class TwinFlowReference(networks.Reference):
    """diffusers' network, which has no second embedder."""

    prefix = "time_guidance_embed_2"

    def __init__(self, config: Flux2Config = SMALL, seed: int = 1) -> None:
        from diffusers import Flux2Transformer2DModel

        raw = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k != "twinflow"}
        super().__init__(randomize(Flux2Transformer2DModel(**raw, guidance_embeds=False), seed), None)

    def predict(self, args: networks.Inputs, t: float) -> Tensor:
        b, c, h, w = args.latents.shape
        axis = torch.arange
        image = torch.cartesian_prod(axis(1), axis(h), axis(w), axis(1)).expand(b, -1, -1)
        text = torch.cartesian_prod(axis(1), axis(1), axis(1), axis(args.embeds.shape[1])).expand(b, -1, -1)
        out = self.network(
            args.latents.flatten(2).transpose(1, 2), args.embeds, torch.full((b,), t), image, text, return_dict=False
        )[0]
        return out.transpose(1, 2).reshape(b, c, h, w)


def autoencoder():
    from diffusers import AutoencoderKLFlux2

    vae = randomize(AutoencoderKLFlux2(**VAE), 3)
    generator = torch.Generator().manual_seed(5)
    vae.bn.running_mean.copy_(torch.randn(16, generator=generator) * 0.3)
    vae.bn.running_var.copy_(torch.rand(16, generator=generator) + 0.5)
    return vae


def make_model(folder: Path) -> Path:
    """A whole FLUX.2-klein folder, random: text encoder of 28 layers, of which three are read."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=259, hidden_size=TEXT_DIM, intermediate_size=24, num_hidden_layers=28, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    encoder, vae = randomize(Qwen3ForCausalLM(config), 4), autoencoder()
    network = TwinFlowReference(replace(SMALL, joint_attention_dim=3 * TEXT_DIM)).network
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Flux2KleinPipeline(scheduler, vae, encoder, tokenizer(), network, is_distilled=True).save_pretrained(folder)
    return folder
