"""Nodes for ComfyUI: load, encode, sample, decode. How to install them: docs/comfyui.md.

A LATENT holds raw latents of the model's VAE, as ComfyUI's own nodes pass them on, so its VAE Decode, previews
and latent operations fit; the pipeline's are normalised, z = (raw - offset) * divisor. An IMAGE is float32
[B, H, W, 3] in [0, 1]. Both are on the CPU between nodes. Nothing of ComfyUI is imported: when it runs, its
module that knows of interrupts is there already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor

from ..config import check_count
from ..errors import ConfigError, NonFiniteError
from ..loading import load
from ..options import GuidanceOptions, LoadOptions, describe
from ..pipeline import Pipeline
from ..runtime.host_state import isolated
from ..sampling.noise import MAX_SEED, resolve_seeds
from ..stages.image_input import STRENGTH
from ..stages.text import PromptEmbeds

MODEL, PROMPT = "TWINFLOW_MODEL", "TWINFLOW_PROMPT"  # types of our own: they connect to nothing else
MAX_BATCH = 64
AUTO = "auto"  # of a widget: an option of `load` left at its default
WIDGETS: dict[str, Any] = {  # the options of `load` that the node has; of files, one a line
    "base": "STRING", "files": "STRING", "device": "STRING", "dtype": [AUTO, "float32", "bfloat16", "float16"],
    "precision": [AUTO, "int8", "fp8", "int4"],
}  # fmt: skip
PATH = "model folder, hf://owner/name, or demo; with base, a file of one network's weights"
Inputs = dict[str, dict[str, tuple[Any, ...]]]


class Load:
    """A model folder, or files beside one, compiled. ComfyUI keeps it until an input changes."""

    RETURN_TYPES: ClassVar = (MODEL,)
    RETURN_NAMES: ClassVar = ("model",)
    FUNCTION, CATEGORY = "load", "TwinFlow"
    DESCRIPTION = "Loads a TwinFlow model folder (diffusers layout), or GGUF and safetensors files, and compiles it."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"path": ("STRING", {"default": "demo", "tooltip": PATH})},
            "optional": {
                name: (WIDGETS[name], {"default": AUTO, "tooltip": describe(option), "multiline": name == "files"})
                for name, option in ((option.name, option) for option in fields(LoadOptions))
                if name in WIDGETS
            },
        }

    def load(
        self, path: str, base: str = AUTO, files: str = AUTO, device: str = AUTO, dtype: str = AUTO,
        precision: str = AUTO,
    ) -> tuple[Pipeline]:  # fmt: skip
        """Raises what `twinflow_rt.load` raises."""
        given: dict[str, Any] = {"base": base, "device": device, "dtype": dtype, "precision": precision}
        lines = [] if files == AUTO else [line.strip() for line in files.splitlines() if line.strip()]
        options = LoadOptions(files=lines, **{name: value for name, value in given.items() if value not in ("", AUTO)})
        return (load(path, **vars(options)),)


class Encode:
    """A prompt as the model reads it."""

    RETURN_TYPES: ClassVar = (PROMPT,)
    RETURN_NAMES: ClassVar = ("prompt",)
    FUNCTION, CATEGORY = "encode", "TwinFlow"
    DESCRIPTION = "Encodes a prompt with the model's own text encoder."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        text = ("STRING", {"multiline": True, "dynamicPrompts": True, "default": "a green triangle"})
        return {"required": {"model": (MODEL,), "text": text}}

    def encode(self, model: Pipeline, text: str) -> tuple[PromptEmbeds]:
        """Raises ConfigError for what is no prompt to the pipeline; warns of one that is cut."""
        return (model.text([text]),)


class Sample:
    """Images of one prompt as latents, from noise or from an image of the batch each."""

    RETURN_TYPES: ClassVar = ("LATENT",)
    FUNCTION, CATEGORY = "sample", "TwinFlow"
    DESCRIPTION = "Samples a batch; image k depends on seed + k alone (after 2^64 - 1 comes 0)."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        pixels = {"default": 0, "min": 0, "max": 4096, "step": 8, "tooltip": "0: the image's, or the model's own"}
        seed = {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}
        guidance, negative = fields(GuidanceOptions)
        nfe = {"default": 0, "min": 0, "max": 100, "tooltip": "network evaluations per image; 0: the model's own"}
        return {
            "required": {
                "model": (MODEL,),
                "prompt": (PROMPT,),
                "seed": ("INT", seed),
                "width": ("INT", pixels),
                "height": ("INT", pixels),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": MAX_BATCH}),
                "nfe": ("INT", nfe),
            },
            "optional": {
                "image": ("IMAGE",),
                "mask": ("MASK", {"tooltip": "of the image's size: where it is painted anew"}),
                "strength": ("FLOAT", {"default": STRENGTH, "min": 0.01, "max": 1.0, "step": 0.01}),
                "guidance": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "tooltip": describe(guidance)}),
                "negative_prompt": ("STRING", {"multiline": True, "default": "", "tooltip": describe(negative)}),
            },
        }

    @isolated()
    def sample(
        self, model: Pipeline, prompt: PromptEmbeds, seed: int, width: int = 0, height: int = 0, batch_size: int = 1,
        nfe: int = 0, image: Tensor | None = None, mask: Tensor | None = None, strength: float = STRENGTH,
        guidance: float = 0.0, negative_prompt: str = "",
    ) -> tuple[dict[str, Tensor]]:  # fmt: skip
        """{"samples": raw latents float32 [batch_size, C, h, w]}. image: [1 or batch_size, H, W, 3], mask: [1 or
        batch_size, H, W], both in [0, 1]. Raises what the pipeline raises."""
        (first,), count = resolve_seeds(seed, 1), check_count("batch_size", batch_size)
        past = first + count > MAX_SEED and count <= MAX_BATCH
        seeds = [(first + k) % (MAX_SEED + 1) for k in range(count)] if past else seed
        picture: dict[str, Any] = {} if mask is None else {"mask": mask[:, None]}
        if image is not None:
            picture |= {"image": image[..., :3].movedim(-1, 1), "strength": strength}
        result = model(
            prompt, width=width or None, height=height or None, seed=seeds, num_images=batch_size, nfe=nfe or None,
            output="latent", cancel=_interrupted(), guidance=guidance or None, negative_prompt=negative_prompt,
            **picture,
        )  # fmt: skip
        std, mean = (value.view(-1, 1, 1) for value in (model.vae.std, model.vae.mean))
        return ({"samples": (result.images.float() * std + mean).cpu()},)


class Decode:
    """Latents to images, by the model's VAE."""

    RETURN_TYPES: ClassVar = ("IMAGE",)
    FUNCTION, CATEGORY = "decode", "TwinFlow"
    DESCRIPTION = "Decodes latents with the model's VAE."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"model": (MODEL,), "samples": ("LATENT",)}}

    @isolated()
    def decode(self, model: Pipeline, samples: dict[str, Tensor]) -> tuple[Tensor]:
        """float32 [B, h * scale, w * scale, 3] in [0, 1], from raw latents [B, C, h, w], or [B, C, 1, h, w] as
        ComfyUI has them for video VAEs. Raises ConfigError for latents of another model."""
        raw = samples["samples"]
        if raw.ndim == 5 and raw.shape[2] == 1:
            raw = raw[:, :, 0]
        if raw.ndim != 4 or raw.shape[1] != model.vae.channels:
            raise ConfigError(
                f"latents of shape {tuple(raw.shape)} are not this model's: its VAE decodes images of "
                f"[batch, {model.vae.channels}, height, width]; connect the sampler of the same model"
            )
        images = model.vae.decode(raw.to(model.device), raw=True).float() / 2 + 0.5
        if model.check_finite and not images.isfinite().all():
            raise NonFiniteError(
                "these latents become pixels of NaN or infinity, and would be black: load the model with dtype float32"
            )
        return (images.clamp(0, 1).permute(0, 2, 3, 1).contiguous().cpu(),)


def _interrupted() -> Callable[[], bool] | None:
    """For `cancel`: ComfyUI's own exception when its user has pressed stop. None elsewhere."""
    comfy = sys.modules.get("comfy.model_management")
    if comfy is None:
        return None

    def interrupted() -> bool:
        comfy.throw_exception_if_processing_interrupted()
        return False

    return interrupted


NODE_CLASS_MAPPINGS = {
    "TwinFlowLoad": Load, "TwinFlowEncode": Encode, "TwinFlowSample": Sample, "TwinFlowDecode": Decode,
}  # fmt: skip
NODE_DISPLAY_NAME_MAPPINGS = {
    "TwinFlowLoad": "TwinFlow Load", "TwinFlowEncode": "TwinFlow Encode Prompt", "TwinFlowSample": "TwinFlow Sample",
    "TwinFlowDecode": "TwinFlow Decode",
}  # fmt: skip
