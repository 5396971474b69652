"""From the last tokens to the VAE's input in one op, against doing it in three: every family, whole pipelines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from twinflow_rt import ops
from twinflow_rt.bench.random_weights import temporary
from twinflow_rt.errors import CancelledError
from twinflow_rt.loading import load


@pytest.fixture(scope="module", params=["z-image", "qwen-image", "sd3.5-m", "sana"])
def pipe(request):
    with temporary(request.param, scale=0.05, layers=1) as folder:
        yield load(folder, device="cpu", dtype="float32")


def fused(pipe, calls, dtype=None):
    """The pipeline's table with an op that records its calls, as if a kernel had been chosen."""

    def x0_to_vae(x, velocity, t, std, mean, kind):
        calls.append((x, velocity, t, std, mean, kind))
        return ops.x0_to_vae(x, velocity, t, std, mean, kind)

    return replace(pipe.program.network.ops, x0_to_vae=x0_to_vae)


def images(pipe, **options):
    options = {"output": "pt", **options}
    return pipe(["a red circle", "a blue square"], seed=3, height=64, width=128, **options).images


def test_the_same_images(pipe):
    """In float32 the two differ by roundings of the VAE's input alone."""
    plain, network, calls = images(pipe), pipe.program.network, []
    before = network.ops
    network.ops = fused(pipe, calls)
    try:
        for at_once in (2, 1):
            pipe.batch_invariant = at_once == 1
            assert (images(pipe) - plain).abs().max() < 1e-5
            assert len(calls) == 3 - at_once
            calls.clear()
        pipe.batch_invariant = False
        pixels = (plain * 255).permute(0, 2, 3, 1).numpy()
        assert abs(images(pipe, output="np").astype(float) - pixels).max() < 0.51
        x, velocity, t, std, mean, kind = calls.pop()
        size = velocity.shape[-1]
        assert velocity.shape == (*x.shape[:2], x.shape[2] // size, size, x.shape[3] // size, size)
        # what the kernel reads is the last layer's output itself: one storage, as large as the latents
        assert velocity.untyped_storage().nbytes() == x.nbytes and not velocity.is_contiguous()
        assert std.shape == mean.shape == (pipe.vae.channels,) and std.dtype == torch.float32 and kind == torch.float32
        latents = images(pipe, output="latent")
        raw = latents.float() / pipe.vae._divisor + pipe.vae._offset
        torch.testing.assert_close(ops.x0_to_vae(x, velocity, t, std, mean, kind), raw, rtol=1e-5, atol=1e-5)
    finally:
        network.ops = before


def test_where_x0_itself_is_wanted(pipe):
    """Callbacks, latents and several evaluations take the plain way; cancelling works on either."""
    network, calls, seen = pipe.program.network, [], []
    before = network.ops
    network.ops = fused(pipe, calls)
    try:
        images(pipe, callback=lambda *state: seen.append(state[2]))
        images(pipe, output="latent")
        assert not calls and seen[0].shape[1] == pipe.vae.channels
        with pytest.raises(CancelledError):
            images(pipe, cancel=lambda: True)
    finally:
        network.ops = before
    network.ops = fused(pipe, calls)
    try:
        images(pipe, nfe=2)
    finally:
        pipe.program.network.ops = before
        pipe.program.refold(((1.0, 0.0),))
    assert not calls
