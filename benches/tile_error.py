"""What decoding in tiles costs in exactness where group norms see a tile in place of the image.

    python -m benches.tile_error          # the shipped model: 64 of its images side by side, 512 x 512 pixels

Prints, per tile size, the largest and the mean difference to the image decoded whole, in 1/255.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from twinflow_rt.loading import load
from twinflow_rt.stages import tiles

PROMPTS = ("a red circle above a blue square", "two green triangles", "a yellow cross", "a purple square")
SIDE = 8  # images along each axis
TILES = (64, 128, 256)


@torch.inference_mode()
def main() -> None:
    pipe = load("demo", device="cpu")
    latents = pipe(list(PROMPTS) * (SIDE * SIDE // len(PROMPTS)), seed=0, output="latent").images
    _, channels, height, width = latents.shape
    sheet = latents.view(SIDE, SIDE, channels, height, width).permute(2, 0, 3, 1, 4)
    sheet = sheet.reshape(1, channels, SIDE * height, SIDE * width)
    whole = pipe.vae.decode(sheet).clamp(-1, 1)
    print(f"{whole.shape[3]} x {whole.shape[2]} pixels, overlap {tiles.margin(pipe.vae.network) * pipe.vae.scale}")
    for tile in TILES:
        pipe.vae.options = replace(pipe.vae.options, tile=tile)
        error = (pipe.vae.decode(sheet).clamp(-1, 1) - whole).abs() * 127.5
        print(f"tiles of {tile:>4} pixels: at most {error.max():5.1f}, mean {error.mean():.2f}")


if __name__ == "__main__":
    main()
