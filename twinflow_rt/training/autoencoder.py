"""Trains the demo's autoencoder on scenes: diffusers' AutoencoderKL, 4x4 pixels to a latent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.atomic import new_folder
from .scenes import render, sample_scene
from .trainer import Trainer, TrainerConfig

CONFIG = dict(
    in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 32, 64), sample_size=64, act_fn="silu",
    use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
)  # fmt: skip
KL_WEIGHT = 1e-4
LATENT_NOISE = 0.05  # the decoder must bear what a one-step generator gets slightly wrong
EDGE = 6.0  # weight of the outermost rows and columns (corners: squared), which zero padding makes the hardest to learn


def to_tensor(images: np.ndarray) -> Tensor:
    """Return uint8 [B, H, W, 3] as float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


class Autoencoder(nn.Module):
    """AutoencoderKL with its loss: L1, heavier at the image's edge, + small KL; `seed` and the step count fix every
    batch. Under plain L1 a corner, one pixel of 4,096 that sees four taps of nine, keeps a tint (35 of 255)."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        posterior = self.vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        z = posterior.sample()
        z = z + LATENT_NOISE * z.std().detach() * torch.randn_like(z)
        reconstruction = self.vae.decode(z).sample
        error = reconstruction - images
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        psnr = 20 * np.log10(2) - 10 * error.detach().square().mean().log10()
        return (error.abs() * edge_weights(images)).mean() + KL_WEIGHT * kl, {"psnr": psnr}


def edge_weights(images: Tensor) -> Tensor:
    """Return [H, W]: 1 inside, EDGE along the four sides, its square in the corners; of mean 1."""
    rows, columns = (torch.ones(n, device=images.device) for n in images.shape[-2:])
    for side in (rows, columns):
        side[[0, -1]] = EDGE
    weights = rows[:, None] * columns
    return weights / weights.mean()


def _draw(batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw fresh scenes; numpy's generator is seeded from torch's, whose state is checkpointed."""
    rng = np.random.default_rng(int(torch.randint(2**62, ())))
    return to_tensor(np.stack([render(sample_scene(rng)) for _ in range(batch)])).to(device)


def train_autoencoder(
    out: Path, *, steps: int = 1200, batch: int = 16, seed: int = 0, log: Callable[[str], None] = print,
    device: torch.device | str = "cpu",
) -> Path:  # fmt: skip
    """Train or resume in folder `out`; return `out`/final, for AutoencoderKL.from_pretrained.

    A folder already finished is returned as it is. shift_factor and scaling_factor normalise
    latents to mean 0, standard deviation 1 over scenes: (z - shift_factor) * scaling_factor.
    """
    final = out / "final"
    if final.exists():
        return final
    torch.manual_seed(seed)
    config = TrainerConfig(steps=steps, lr=2e-3, ema=0.995, seed=seed)
    loss = lambda model, *_: model.loss(_draw(batch, device))
    vae = Trainer("autoencoder", Autoencoder().to(device), loss, config, out, log).run().vae.eval()
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        latents = vae.encode(_draw(256, device)).latent_dist.mean
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    with new_folder(final) as partial:
        vae.save_pretrained(partial)
    return final


def load_autoencoder(folder: Path) -> nn.Module:
    """Open the finished autoencoder, in evaluation mode."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)


@torch.no_grad()
def encode_images(vae: nn.Module, images: np.ndarray) -> Tensor:
    """Return the normalised latents (mean of the posterior) of uint8 [B, H, W, 3]: [B, 4, H/4, W/4] float32."""
    z = vae.encode(to_tensor(images).to(vae.device)).latent_dist.mean
    return (z - vae.config.shift_factor) * vae.config.scaling_factor
