"""Captions to images for scoring: a pipeline at one sampler setting, noise seeds counted from 0."""

from __future__ import annotations

from typing import Any

import numpy as np

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
            scale = self.guidance - 1 + self.pipe.program.network.unguided
            batches.append(self.pipe(part, seed=seeds, sampler=self.sampler, guidance=scale, output="np").images)
        return np.concatenate(batches)
