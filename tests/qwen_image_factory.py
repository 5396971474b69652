"""Tiny Qwen-Image networks with random weights: diffusers' own as the oracle, and whole folders."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import networks
from tests.factory import WEIGHTS, randomize, tokenizer
from twinflow_rt.models.transformers.qwen_image import QwenImageConfig

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


class TwinFlowReference(networks.Reference):
    """diffusers' network; its time embedding replaced by TwinFlow's formula, term by term."""

    prefix = "time_text_embed_2"

    def __init__(self, config: QwenImageConfig = SMALL, seed: int = 1) -> None:
        from diffusers import QwenImageTransformer2DModel
        from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings

        raw = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        network = randomize(QwenImageTransformer2DModel(**raw), seed)
        super().__init__(network, randomize(QwenTimestepProjEmbeddings(config.dim), seed + 1))

    def predict(self, args: networks.Inputs, t: float) -> Tensor:
        b, c, h, w = args.latents.shape
        packed = args.latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)
        mask = torch.arange(args.embeds.shape[1]) < torch.tensor(args.lengths)[:, None]
        times = torch.full((b,), t, dtype=packed.dtype)
        out = self.network(packed, args.embeds, mask, times, [[(1, h // 2, w // 2)]] * b, return_dict=False)[0]
        return out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)

    def add_second(self, t: float, tt: float):
        return lambda module, args, kwargs, output: add_second(self.second, tt)(module, args, output)


@st.composite
def configs(draw) -> QwenImageConfig:
    axes, channels = draw(st.tuples(*[st.integers(1, 3)] * 3)), draw(st.integers(1, 3))
    return QwenImageConfig(
        in_channels=4 * channels, out_channels=channels, num_layers=draw(st.integers(1, 3)),
        num_attention_heads=draw(st.integers(1, 3)), attention_head_dim=2 * sum(axes), joint_attention_dim=5,
        axes_dims_rope=tuple(2 * a for a in axes),
    )  # fmt: skip


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
