"""What batch-invariant costs: a batch through the networks together, and one image at a time.

    make bench        (or: pytest benches/bench_reliability.py --benchmark-only -o python_files='bench_*.py')

Nothing is timed whose images are not, to the last bit, those of each image alone (batch-invariant), or those to
float32 rounding (together). The ratio of the two rows of a group is the cost.
"""

from __future__ import annotations

import pytest
import torch

PROMPTS = ("a red circle", "a blue square beside a small green triangle")
TOLERANCE = {True: 0.0, False: 1e-4}  # of images in [0, 1]


@pytest.mark.parametrize("count", [4, 8], ids=["4 images", "8 images"])
@pytest.mark.parametrize("batch_invariant", [False, True], ids=["together", "batch-invariant"])
def test_batch(benchmark, pipe, batch_invariant, count):
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    run = lambda: pipe(prompts, seed=0, output="pt").images
    alone = torch.cat([pipe(prompt, seed=seed, output="pt").images for seed, prompt in enumerate(prompts)])
    pipe.batch_invariant = batch_invariant
    try:
        assert (run() - alone).abs().max() <= TOLERANCE[batch_invariant]
        benchmark.group = f"{count} images in one call"
        benchmark(run)
    finally:
        pipe.batch_invariant = False
