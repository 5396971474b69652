"""What `strength` does to the shipped miniature: a sheet of examples, and shares over many pictures.

    python -m benches.strengths docs/strengths.png

A picture of one scene is given with the prompt of another. "follows" is the share of images that show what the prompt
asks for, "keeps" of those that still show the picture's scene (by `evaluate.check`), "change" the mean difference from
the picture, of 255. The sheet has the picture, then one image per strength; a row per number of evaluations.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from twinflow_rt.checkpoint.image_files import grid, save_image
from twinflow_rt.evaluate.check import check
from twinflow_rt.loading import load
from twinflow_rt.stages.result import pil
from twinflow_rt.training.scenes import prompts, render

STRENGTHS, EVALUATIONS, COUNT = (0.3, 0.6, 0.75, 0.9), (1, 4), 96


def main(sheet: Path) -> None:
    pipe = load("demo", device="cpu", dtype="float32")
    before, after = (prompts("colors", COUNT, seed=seed) for seed in (0, 1))
    pictures = np.stack([render(scene) for scene in before])
    shown = []
    print("evaluations  strength  follows  keeps  change")
    for nfe in EVALUATIONS:
        shown.append(pictures[0])
        for strength in STRENGTHS:
            captions, seeds = [scene.caption for scene in after], list(range(COUNT))
            images = pipe(captions, image=list(pictures), strength=strength, nfe=nfe, seed=seeds, output="np").images
            follows, keeps = (
                sum(check(image, scene).correct for image, scene in zip(images, scenes, strict=True)) / COUNT
                for scenes in (after, before)
            )
            change = np.abs(images.astype(int) - pictures).mean()
            print(f"{nfe:11}  {strength:8}  {follows:7.2f}  {keeps:5.2f}  {change:6.1f}")
            shown.append(images[0])
    save_image(grid(pil(np.stack(shown)), 1 + len(STRENGTHS)), sheet)
    print(f"{before[0].caption}, then {after[0].caption}: {sheet}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
