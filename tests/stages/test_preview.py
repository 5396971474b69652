"""The preview decoder against diffusers' AutoencoderTiny."""

from __future__ import annotations

import json

import pytest
import torch

from tests.factory import CHANNELS, make_model, randomize
from tests.runtime.test_capture import FakeGraphs, record
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.loading import load
from twinflow_rt.runtime.capture import Captures

SIZES = {"decoder_block_out_channels": (16,) * 3, "encoder_block_out_channels": (16,) * 3}
BLOCKS = {"num_decoder_blocks": (2, 3, 1), "num_encoder_blocks": (1, 1, 1), "latent_channels": CHANNELS}


def tiny(folder, **changes):
    from diffusers import AutoencoderTiny

    vae = randomize(AutoencoderTiny(**{**SIZES, **BLOCKS, **changes}), 5)
    vae.save_pretrained(folder)
    return vae


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("preview") / "m")


def test_equals_diffusers(model, tmp_path):
    vae = tiny(tmp_path / "tiny")
    pipe = load(model, device="cpu", preview=tmp_path / "tiny")
    args = {"height": 24, "width": 16, "seed": 3, "num_images": 2}
    latents = pipe("a", output="latent", **args).images
    with torch.inference_mode():
        expected = vae.decode(latents * 1.0).sample
    ours = pipe("a", output="pt", preview=True, **args).images
    assert (ours - (expected / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5
    with torch.inference_mode():
        assert (pipe.preview.decode(4 * latents) - vae.decode(4 * latents).sample).abs().max() < 1e-5  # the soft limit
    exact = pipe("a", output="pt", **args).images
    assert (ours - exact).abs().max() > 0.01 and pipe("a", preview=True, **args).images[0].size == (16, 24)
    record(pipe, Captures(FakeGraphs(), strict=True))
    for preview, image in ((True, ours), (False, exact), (True, ours)):
        assert (pipe("a", output="pt", preview=preview, **args).images - image).abs().max() < 1e-5
    assert {name: pipe.captures.stats()[name].recorded for name in ("preview", "decode")} == {"preview": 1, "decode": 1}


def test_needs_a_decoder(model):
    with pytest.raises(ConfigError, match="preview=True needs a preview decoder"):
        load(model, device="cpu")("a", height=16, width=16, preview=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"latent_channels": 3}, CheckpointError, "decodes 3 channels"),
        (
            {"decoder_block_out_channels": (16, 16), "num_decoder_blocks": (1, 1),
             "encoder_block_out_channels": (16, 16), "num_encoder_blocks": (1, 1)},
            CheckpointError, "at 2 pixels a latent",
        ),
        ({"act_fn": "silu"}, ConfigError, "supported are relu"),
    ],
)  # fmt: skip
def test_other_decoders_are_refused(model, tmp_path, changes, error, message):
    tiny(tmp_path / "tiny", **changes)
    with pytest.raises(error, match=message):
        load(model, device="cpu", preview=tmp_path / "tiny")


def test_another_vae_is_refused(model, tmp_path):
    tiny(tmp_path / "tiny")
    config = tmp_path / "tiny" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "AutoencoderKL"}))
    with pytest.raises(ConfigError, match="is an AutoencoderTiny"):
        load(model, device="cpu", preview=tmp_path / "tiny")


def test_from_the_command_line(model, tmp_path):
    """Beside a budget and tiles, which change nothing but where memory goes."""
    from twinflow_rt.cli import main

    tiny(tmp_path / "tiny")
    common = ["generate", "a", "--model", str(model), "--size", "16", "--seed", "3", "--device", "cpu"]
    options = ["--preview", str(tmp_path / "tiny"), "--memory-budget", "1GB", "--tile", "64"]
    assert main([*common, *options, "-o", str(tmp_path / "a.png")]) == 0
    assert main([*common, "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
