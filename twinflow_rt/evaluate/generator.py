"""Captions to images for scoring: a pipeline at one sampler setting, noise seeds counted from 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..sampling.noise import initial_noise, step_noise
from ..sampling.sampler import sample
from ..sampling.schedule import schedule

BATCH = 32


class Generator:
    """captions -> uint8 images of one sampler setting; image k of a list has noise seed k.

    guidance: of plain flow models, F_empty + guidance * (F_caption - F_empty) (arXiv 2207.12598), two
    evaluations a step; 1 is off, as TwinFlow models are run.
    """

    def __init__(self, pipe: Any, sampler: Any, guidance: float = 1.0) -> None:
        self.pipe, self.sampler, self.guidance = pipe, sampler, guidance

    def __call__(self, captions: list[str]) -> np.ndarray:
        batches = []
        for start in range(0, len(captions), BATCH):
            part = captions[start : start + BATCH]
            seeds = list(range(start, start + len(part)))
            if self.guidance == 1:
                batches.append(self.pipe(part, seed=seeds, sampler=self.sampler, output="np").images)
            else:
                batches.append(self._guided(part, seeds))
        return np.concatenate(batches)

    def _guided(self, captions: list[str], seeds: list[int]) -> np.ndarray:
        pipe, vae = self.pipe, self.pipe.vae
        with torch.inference_mode():
            pipe.program.refold(schedule(self.sampler, pipe.dtype))
            network = pipe.program.network
            context = pipe.velocity.context((*captions, *[""] * len(captions)), pipe.text.encode)

            def velocity(x: Any, step: int) -> Any:
                asked, empty = network(torch.cat((x, x)), network.step_modulation(step), context).chunk(2)
                return torch.lerp(empty, asked, self.guidance)

            height, width = (n // vae.scale for n in pipe.sizes.resolve(None, None))
            shape = (vae.channels, height, width)
            noise = initial_noise(seeds, shape, pipe.dtype, pipe.device)
            fresh = lambda step: step_noise(seeds, step, shape, device=pipe.device)
            images: np.ndarray = vae.decode_uint8(sample(velocity, noise, self.sampler, noise_fn=fresh)).cpu().numpy()
            return images
