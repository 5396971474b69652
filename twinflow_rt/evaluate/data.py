"""The examiner examined: scores of the data itself, as drawn and after a VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..training.scenes import KINDS, prompts, render
from .check import Scores, score


def score_data(vae_folder: Path, per_kind: int = 50, seed: int = 0) -> dict[str, Scores]:
    """Score `per_kind` rendered scenes of each kind, "drawn" and "encoded": encoded and decoded by the
    VAE in `vae_folder`. The first bounds what the checker can give, the second what a generator can get."""
    import torch

    from ..training.autoencoder import encode_images, load_autoencoder

    scenes = [s for kind in KINDS for s in prompts(kind, per_kind, "train", seed)]
    drawn = np.stack([render(s) for s in scenes])
    vae: Any = load_autoencoder(vae_folder)
    with torch.inference_mode():
        raw = encode_images(vae, drawn) / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(raw).sample
    encoded = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return {"drawn": score(drawn, scenes), "encoded": score(encoded, scenes)}
