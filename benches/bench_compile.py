"""What folding buys on the demo model: one velocity evaluation with and without time in the program.

    make bench        (or: pytest benches/bench_compile.py --benchmark-only)

The unfolded network is what a diffusers-style runtime keeps: embedders and modulation evaluated per
call. Both must agree to 1e-5 before either is timed. The last case times compilation itself.
"""

from __future__ import annotations

import pytest
import torch

from twinflow_rt.compile import compile_network
from twinflow_rt.models import family_of
from twinflow_rt.passes.load import Checkpoint, materialize
from twinflow_rt.pipeline import DEMO

CPU, SCHEDULE = torch.device("cpu"), ((1.0, 0.0),)


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(DEMO / "transformer")


def build(checkpoint):
    return compile_network(checkpoint, family_of(checkpoint.config), SCHEDULE, device=CPU, dtype=torch.float32).network


@pytest.fixture(scope="module")
def evaluations(checkpoint):
    """name -> a function that evaluates the velocity of one 64x64 image once."""
    family, folded = family_of(checkpoint.config), build(checkpoint)
    with torch.device("meta"):
        unfolded = family.network(folded.config)
    materialize(unfolded, checkpoint, family.layout, CPU, torch.float32)
    unfolded.ops = folded.ops
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, folded.config.in_channels, 16, 16, generator=generator)
    embeds = torch.randn(1, 17, folded.config.cap_feat_dim, generator=generator)
    one, zero = torch.ones(1), torch.zeros(1)
    context = folded.encode_context(embeds, (17,))
    runs = {
        "folded": lambda: folded(latents, folded.step_modulation(0), context),
        "unfolded": lambda: unfolded(latents, unfolded.modulate(one, zero), context),
        "unfolded+context": lambda: unfolded(
            latents, unfolded.modulate(one, zero), unfolded.encode_context(embeds, (17,))
        ),
    }
    with torch.inference_mode():
        reference = runs["unfolded"]()
        for name, run in runs.items():
            error = (run() - reference).abs().max() / reference.abs().max()
            assert error < 1e-5, f"{name} is off by {error:.1e}"
    return runs


@pytest.mark.benchmark(group="velocity of the demo model, one 64x64 image, float32")
@pytest.mark.parametrize("name", ["folded", "unfolded", "unfolded+context"])
def test_velocity(benchmark, evaluations, name):
    with torch.inference_mode():
        benchmark.pedantic(evaluations[name], rounds=200, warmup_rounds=20)


@pytest.mark.benchmark(group="compile of the demo model (load, fold, fuse, select)")
def test_compile(benchmark, checkpoint):
    with torch.inference_mode():
        benchmark.pedantic(build, args=(checkpoint,), rounds=20, warmup_rounds=2)
