"""Writes a trained miniature as a Z-Image model folder that diffusers' own classes load."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoint.atomic import new_folder, write_json
from ..checkpoint.fuse import split
from ..models.transformers.z_image import FUSED

MODEL_INDEX = {
    "_class_name": "ZImagePipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}


def save_model(
    folder: Path, network: nn.Module, text_encoder: nn.Module, tokenizer: object, vae_dir: Path,
    dtype: torch.dtype = torch.float16,
) -> Path:  # fmt: skip
    """Save network (keys split into the checkpoint's names), text encoder, tokenizer and VAE in `dtype`.

    The folder appears under its name only when complete; only then does an older one go.
    """
    with new_folder(folder, lambda partial: shutil.rmtree(folder, ignore_errors=True)) as partial:
        for part in ("transformer", "vae", "scheduler"):
            (partial / part).mkdir()
        write_json(partial / "model_index.json", MODEL_INDEX, indent=2)
        write_json(partial / "scheduler" / "scheduler_config.json", SCHEDULER, indent=2)
        write_json(partial / "transformer" / "config.json", network.config.to_dict(), indent=2)
        weights = split(network.state_dict(), FUSED)
        _write_weights(partial / "transformer", weights, dtype)
        shutil.copy(vae_dir / "config.json", partial / "vae" / "config.json")
        _write_weights(partial / "vae", load_file(vae_dir / "diffusion_pytorch_model.safetensors"), dtype)
        text_encoder.to(dtype).save_pretrained(partial / "text_encoder")
        tokenizer.save_pretrained(partial / "tokenizer")
    return folder


def _write_weights(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    converted = {k: v.detach().to(dtype).contiguous() for k, v in weights.items()}
    save_file(converted, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
