"""DMD2 (arXiv 2405.14867), Stable Diffusion XL distilled to one evaluation, run by diffusers and timed.

    python -m benches.peers.dmd2 --folder SDXL_BASE [--unet UNET] [--size 1024] [--batch 1] [--device cuda]
    python -m benches.peers.dmd2 --random

With a the cumulative product of the noise schedule, the one evaluation of pure noise x is

    x0 = (x - sqrt(1 - a_t) * eps(x, t)) / sqrt(a_t)        t = 399

but for the consistency scheduler's boundary factors, 1 to within 2e-8 there. --folder: the SDXL base
model as diffusers stores it; --unet: DMD2's weights of its network, safetensors or a .bin of tensors.
--random: a network and a decoder of the published shapes with random weights, behind random prompt
embeddings: times of everything but the text encoders, without a file. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinflow_rt.bench import facts, timing
from twinflow_rt.config import DTYPES, resolve_device
from twinflow_rt.errors import CheckpointError, extra_missing

TIMESTEP = 399
PROMPT = "a photograph of a lighthouse in a storm at dusk"
TOKENS = 77
UNET = dict(
    sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
VAE = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=1024,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.13025,
)  # fmt: skip
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}


def load(folder: Path, unet: Path | None, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' SDXL pipeline with DMD2's network. Raises ConfigError without diffusers, CheckpointError
    where the weights are not this network's."""
    _need_diffusers()
    from diffusers import LCMScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    if unet is not None:
        wrong = pipe.unet.load_state_dict(_tensors(unet), strict=False)
        if wrong.missing_keys or wrong.unexpected_keys:
            names = [*wrong.missing_keys, *wrong.unexpected_keys]
            raise CheckpointError(f"{unet} is not a network of {folder}: {len(names)} names differ, first {names[0]}")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def random(
    device: torch.device, dtype: torch.dtype, unet: dict[str, Any] | None = None, vae: dict[str, Any] | None = None
) -> Any:
    """The same pipeline without text encoders and files, its weights random; default: SDXL's shapes."""
    _need_diffusers()
    from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        parts = {"unet": UNet2DConditionModel(**(unet or UNET)), "vae": AutoencoderKL(**(vae or VAE))}
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(**parts, **texts, scheduler=LCMScheduler(**SCHEDULE))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


@torch.inference_mode()
def images(pipe: Any, prompts: Sequence[str], seed: int, size: tuple[int, int], output: str = "pil") -> Any:
    """One evaluation per image of `size` (height, width); image k starts from the noise of seed + k."""
    generators = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
    given = {"prompt": list(prompts)} if pipe.text_encoder is not None else _random_embeddings(pipe, len(prompts))
    return pipe(
        **given, height=size[0], width=size[1], timesteps=[TIMESTEP], guidance_scale=0.0, generator=generators,
        output_type=output,
    ).images  # fmt: skip


def _random_embeddings(pipe: Any, count: int) -> dict[str, Tensor]:
    config, at = pipe.unet.config, {"device": pipe.unet.device, "dtype": pipe.unet.dtype}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "prompt_embeds": torch.randn(count, TOKENS, config.cross_attention_dim, **at),
        "pooled_prompt_embeds": torch.randn(count, pooled, **at),
    }


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)  # a pickle, of which only tensors are read


def _need_diffusers() -> None:
    if absent := [m for m in ("diffusers", "transformers") if find_spec(m) is None]:
        raise extra_missing(f"DMD2 needs {' and '.join(absent)}", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One-step SDXL (DMD2) through diffusers, timed.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=Path)
    source.add_argument("--random", action="store_true")
    parser.add_argument("--unet", type=Path)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    args = parser.parse_args(arguments)
    device, dtype = resolve_device(args.device), DTYPES[args.dtype]
    pipe = random(device, dtype) if args.random else load(args.folder, args.unet, device, dtype)
    prompts, size = [f"{PROMPT} {k}" for k in range(args.batch)], (args.size, args.size)
    samples = timing.measure(lambda: images(pipe, prompts, 0, size), repeats=args.repeats, warmup=2, device=device)
    record = {
        "peer": "dmd2", "weights": "random" if args.random else str(args.folder), "text_encoders": not args.random,
        "size": args.size, "batch": args.batch, "dtype": args.dtype, "seconds": samples.to_dict(),
        "machine": facts.machine(device),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
