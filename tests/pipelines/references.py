"""Miniatures of every family, and diffusers' pipelines for the same files: references of whole calls."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings
from safetensors.torch import load_file

from tests import factory, qwen_image_factory, sana_factory, sd3_factory

PROMPTS = ["a Red square! it's", "a big blue circle above a small green triangle, twice", ""]


@dataclass(frozen=True)
class Model:
    """make(folder): writes the miniature. peer: diffusers' pipeline class. scale: pixels per latent. sizes: heights and
    widths in pixels, the last one small. second: the prefix that TwinFlow's second embedder has in the files, which
    diffusers lacks. call, load: arguments of diffusers' call and of from_pretrained."""

    make: Callable[[Path], Any]
    peer: str
    scale: int
    sizes: tuple[tuple[int, int], ...]
    second: str
    call: dict[str, Any]
    load: dict[str, Any]


NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
# the angle pi / 2 itself, which SANA-Sprint's default of 1.57080 misses by 4e-6
SPRINT = {"max_timesteps": math.pi / 2, "intermediate_timesteps": None, "use_resolution_binning": False}
MODELS = {
    "z-image": Model(
        factory.make_model, "ZImagePipeline", 4, ((64, 64), (24, 80)), "t_embedder_2.", {"guidance_scale": 0.0}, {}
    ),
    "qwen-image": Model(
        partial(factory.make_model, family="qwen-image"), "QwenImagePipeline", 8, ((32, 32), (48, 32), (16, 80)),
        "time_text_embed_2.", {"true_cfg_scale": 1.0, "max_sequence_length": 1024}, {},
    ),
    "sd3": Model(
        partial(factory.make_model, family="sd3"), "StableDiffusion3Pipeline", 4, ((32, 32), (24, 64)),
        "time_text_embed_2.", {"guidance_scale": 0.0}, {},
    ),
    "sd3-without-t5": Model(
        partial(factory.make_model, family="sd3", with_t5=False), "StableDiffusion3Pipeline", 4, ((32, 32), (24, 64)),
        "time_text_embed_2.", {"guidance_scale": 0.0}, NO_T5,
    ),
    "sana": Model(
        partial(factory.make_model, family="sana"), "SanaPipeline", 4, ((32, 32), (64, 32)), "time_embed_2.",
        {"guidance_scale": 0.0, "use_resolution_binning": False}, {},
    ),
    "sana-sprint": Model(
        partial(factory.make_model, family="sprint"), "SanaSprintPipeline", 4, ((32, 32), (64, 32)),
        "time_embed_2.", SPRINT, {},
    ),
}  # fmt: skip


def open_reference(name: str, folder: Path) -> Any:
    """diffusers' pipeline, with TwinFlow's second embedder hooked in for tt = 0 where it counts: at (t, tt) = (1, 0)
    Z-Image multiplies it by 0, and SANA-Sprint has none."""
    model = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, model.peer).from_pretrained(folder, **model.load)
    pipe.set_progress_bar_config(disable=True)
    network, more = pipe.transformer, {}
    if name == "qwen-image":
        embedder, second = network.time_text_embed, QwenTimestepProjEmbeddings(network.inner_dim)
        hook = qwen_image_factory.add_second(second, 0.0)
    elif name.startswith("sd3"):
        pooled = network.config.pooled_projection_dim
        embedder, second = network.time_text_embed, CombinedTimestepTextProjEmbeddings(network.inner_dim, pooled)
        hook = sd3_factory.add_second(second, 0.0)
    elif name == "sana":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        embedder, second = network.time_embed, AdaLayerNormSingle(network.proj_out.in_features)
        hook, more = sana_factory.add_second(second, 0.0), {"with_kwargs": True}
    else:
        return pipe
    stored = load_file(folder / "transformer" / factory.WEIGHTS)
    second.load_state_dict({k.removeprefix(model.second): v for k, v in stored.items() if k.startswith(model.second)})
    embedder.register_forward_hook(hook, **more)
    return pipe


@torch.no_grad()
def images_of(
    name: str, pipe: Any, prompts: list[str], size: tuple[int, int], output: str, noise: torch.Tensor | None = None,
    **more: Any,
) -> Any:  # fmt: skip
    """One Euler step of flow matching from t = 1 to 0: z - F, which is TwinFlow's single evaluation."""
    (height, width), packed = size, name == "qwen-image"
    if noise is not None:
        shape = noise.shape
        more["latents"] = pipe._pack_latents(noise[:, None], *shape) if packed else noise.clone()
    how = {"num_inference_steps": 1, **MODELS[name].call, **more}
    out = pipe(list(prompts), height=height, width=width, output_type=output, **how).images
    return pipe._unpack_latents(out, height, width, 8)[:, :, 0] if packed and output == "latent" else out
