"""What folding buys: one velocity evaluation with and without time in the program.

    make bench        (or: pytest benches/bench_compile.py --benchmark-only -o python_files='bench_*.py')

The unfolded network is what a diffusers-style runtime keeps: embedders and modulation evaluated per
call, and with `+context` the prompt's layers too. It runs on the same ops and the same packed linear
layers, so that the difference is folding alone. All must agree to 1e-5 before any is timed. The first
case times them in turns and records the medians; what compiling costs is in `bench_passes.py`.
"""

from __future__ import annotations

import pytest
import torch

from twinflow_rt.bench.timing import interleave
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.reading import materialize
from twinflow_rt.families import family_of
from twinflow_rt.passes.quantize import convert_layers

CPU, PROMPT = torch.device("cpu"), 17
NAMES = ("folded", "unfolded", "unfolded+context")


@pytest.fixture(scope="module")
def evaluations(pipe):
    """name -> a function that evaluates the velocity of one image of the default size once."""
    checkpoint, folded = Checkpoint(pipe.folder / "transformer"), pipe.program.network
    family = family_of(checkpoint.config)
    with torch.device("meta"):
        unfolded = family.network(folded.config)
    materialize(unfolded, checkpoint, family.layout, CPU, torch.float32)
    unfolded.ops = folded.ops
    for name, module in list(unfolded.named_modules()):
        if name.endswith(("attention", "feed_forward")):  # not what time goes through: that is float32 by hand
            convert_layers(module, CPU)
    generator = torch.Generator().manual_seed(0)
    height, width = (n // pipe.vae.scale for n in pipe.sizes.resolve(None, None))
    latents = torch.randn(1, pipe.vae.channels, height, width, generator=generator)
    embeds = torch.randn(1, PROMPT, pipe.text.width, generator=generator)
    one, zero = torch.ones(1), torch.zeros(1)
    with torch.inference_mode():
        context = folded.encode_context(embeds, (PROMPT,))
        runs = (
            lambda: folded(latents, folded.step_modulation(0), context),
            lambda: unfolded(latents, unfolded.modulate(one, zero), context),
            lambda: unfolded(latents, unfolded.modulate(one, zero), unfolded.encode_context(embeds, (PROMPT,))),
        )
        reference = runs[1]()
        for name, run in zip(NAMES, runs, strict=True):
            error = (run() - reference).abs().max() / reference.abs().max()
            assert error < 1e-5, f"{name} is off by {error:.1e}"
    return dict(zip(NAMES, runs, strict=True))


@pytest.mark.benchmark(group="velocity of one image, float32, in turns")
def test_in_turns(benchmark, evaluations):
    """Medians of interleaved runs, in milliseconds, as extra_info."""
    with torch.inference_mode():
        samples = benchmark.pedantic(interleave, (evaluations,), {"repeats": 50, "max_seconds": 10}, rounds=1)
    benchmark.extra_info.update({name: round(taken.median * 1e3, 3) for name, taken in samples.items()})
    print({name: f"{taken.median * 1e3:.2f} +- {taken.mad * 1e3:.2f} ms" for name, taken in samples.items()})


@pytest.mark.benchmark(group="velocity of one image, float32")
@pytest.mark.parametrize("name", NAMES)
def test_velocity(benchmark, evaluations, name):
    with torch.inference_mode():
        benchmark(evaluations[name])
