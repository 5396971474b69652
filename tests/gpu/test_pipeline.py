"""A whole model on the GPU against the same model on the CPU: random weights, published layout, narrow."""

from __future__ import annotations

import pytest

from twinflow_rt.bench.random_weights import temporary
from twinflow_rt.loading import load
from twinflow_rt.ops import EAGER


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def folder(request):
    with temporary(request.param, scale=0.1, layers=2) as path:
        yield path


def latents(folder, device, dtype, precision=None):
    pipe = load(folder, device=device, dtype=dtype, precision=precision)
    prompts = ["a red circle", "a blue square above a circle"]
    return pipe(prompts, seed=7, height=64, width=64, output="latent").images.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bound", [("float32", 2e-3), ("bfloat16", 3e-2)])
def test_latents_agree_with_the_cpu(folder, dtype, bound):
    """Two prompts of unequal length: the ragged attention path. TF32 is off; what differs is the order of sums."""
    want, got = latents(folder, "cpu", "float32").double(), latents(folder, "cuda", dtype).double()
    assert got.isfinite().all()
    assert ((got - want).square().mean() / want.square().mean()).sqrt() < bound


@pytest.mark.gpu
def test_int8_agrees_with_the_cpu(folder):
    """Both quantize alike, from activations that differ in rounding."""
    want, got = (latents(folder, device, "float32", "int8").double() for device in ("cpu", "cuda"))
    assert ((got - want).square().mean() / want.square().mean()).sqrt() < 3e-2


@pytest.mark.gpu
def test_images_agree_with_the_cpu(folder):
    """Through the kernel that projects, unpacks and scales at once, folded upsampling and the VAE's fused norms."""
    images = {}
    for device in ("cpu", "cuda"):
        pipe = load(folder, device=device, dtype="float32")
        images[device] = pipe("a red circle", seed=7, height=64, width=64, output="pt").images.cpu()
    assert pipe.program.network.ops.x0_to_vae is not EAGER.x0_to_vae
    assert (images["cuda"] - images["cpu"]).abs().max() < 1e-2
