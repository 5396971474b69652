"""The autoencoder learns, repeats itself for a seed, and is written as diffusers loads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from twinflow_rt.training.autoencoder import (
    Autoencoder,
    edge_weights,
    encode_images,
    load_autoencoder,
    to_tensor,
    train_autoencoder,
)
from twinflow_rt.training.scenes import KINDS, prompts, render


def images(n: int, seed: int = 3) -> np.ndarray:
    """`n` renders of every kind, uint8 [6 n, 64, 64, 3]."""
    return np.stack([render(s) for kind in KINDS for s in prompts(kind, n, seed=seed)])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vae")
    train_autoencoder(out, steps=3, batch=2, seed=1, log=lambda line: None)
    return out


def test_range_and_layout_of_the_input():
    pixels = np.zeros((1, 2, 3, 3), np.uint8)
    pixels[0, 1, 2] = (255, 0, 51)
    x = to_tensor(pixels)
    assert x.shape == (1, 3, 2, 3) and x.dtype == torch.float32
    torch.testing.assert_close(x[0, :, 1, 2], torch.tensor([1.0, -1.0, -0.6]))


def test_corners_count_for_what_they_are_worth():
    weights = edge_weights(torch.zeros(1, 3, 6, 8))
    assert weights.shape == (6, 8) and weights.mean().item() == pytest.approx(1)
    assert (weights[0, 0] / weights[2, 2]).item() == pytest.approx(36)
    assert (weights[-1, 3] / weights[2, 2]).item() == (weights[3, 0] / weights[2, 2]).item() == pytest.approx(6)


def test_loss_falls_on_a_small_batch():
    torch.manual_seed(0)
    model, x = Autoencoder(), to_tensor(images(1)[:2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        loss, parts = model.loss(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert np.isfinite(parts["psnr"].item())


def test_result_is_diffusers_and_normalises_latents(run):
    vae = load_autoencoder(run / "final")
    assert type(vae).__module__.startswith("diffusers") and not vae.training
    assert vae.quant_conv is None and vae.post_quant_conv is None
    latents = encode_images(vae, images(4))
    assert latents.shape == (24, 4, 16, 16)
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert latents.mean().item() == pytest.approx(0, abs=0.1)
    assert vae.decode(latents[:1]).sample.shape == (1, 3, 64, 64)


def test_same_seed_same_weights(run, tmp_path):
    other = train_autoencoder(tmp_path, steps=3, batch=2, seed=1, log=lambda line: None)
    name = "diffusion_pytorch_model.safetensors"
    assert (other / name).read_bytes() == (run / "final" / name).read_bytes()
    assert (other / "config.json").read_text() == (run / "final" / "config.json").read_text()


def test_a_finished_folder_is_not_trained_again(run):
    lines = []
    assert train_autoencoder(run, steps=9, batch=2, log=lines.append) == run / "final"
    assert lines == []


DEMO = Path(__file__).parents[2] / "twinflow_rt" / "demo"


@pytest.mark.skipif(not (DEMO / "vae").exists(), reason="the shipped demo is absent")
def test_shipped_autoencoder_reconstructs_fresh_scenes():
    vae, pixels = load_autoencoder(DEMO / "vae").float(), images(10, seed=11)
    x = to_tensor(pixels)
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    assert 10 * np.log10(4 / (y - x).square().mean().item()) > 32
    assert sum(p.numel() for p in vae.parameters()) < 700_000
    corners = (y - x).mean(0)[:, [0, 0, -1, -1], [0, -1, 0, -1]] * 127.5
    assert corners.abs().max() < 6  # no tint, in 1/255
    assert 0.8 < encode_images(vae, pixels).std().item() < 1.25
