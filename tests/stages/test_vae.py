"""The decoder against diffusers' AutoencoderKL."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.factory import VAE, randomize, read
from twinflow_rt.errors import ConfigError
from twinflow_rt.models.autoencoders.autoencoder_kl import MODEL, AutoencoderConfig
from twinflow_rt.stages.vae import VaeDecoder

CPU = torch.device("cpu")
VARIANTS = [
    {},
    {"use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None},
    {"mid_block_add_attention": False, "layers_per_block": 2},
    {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
     "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 3},
]  # fmt: skip


WIDE = {"block_out_channels": (96, 128), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2}  # of which convolutions become Winograd's


def saved(tmp_path, **changes):
    from diffusers import AutoencoderKL

    vae = randomize(AutoencoderKL(**{**VAE, **changes}), 0)
    vae.save_pretrained(tmp_path / "vae")
    return vae, tmp_path


@torch.inference_mode()
def theirs(vae, latents):
    raw = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    return vae.decode(raw.to(vae.dtype)).sample


@pytest.mark.parametrize("changes", [*VARIANTS, WIDE])
@pytest.mark.parametrize("size", [(16, 16), (2, 10), (1, 1)])
def test_equals_diffusers(tmp_path, changes, size):
    vae, folder = saved(tmp_path, **changes)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.float32)
    latents = torch.randn(2, vae.config.latent_channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        image, pixels = decoder.decode(latents), decoder.decode_uint8(latents)
    expected = theirs(vae, latents)
    assert image.shape == expected.shape == (2, 3, size[0] * decoder.scale, size[1] * decoder.scale)
    assert (image - expected).abs().max() < 1e-5 * expected.abs().max()
    assert np.abs(pixels.numpy().astype(int) - diffusers_pixels(expected)).max() <= 1
    assert decoder.reports[0].bytes_unused > 0  # the encoder


def diffusers_pixels(images):
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor()
    return (processor.postprocess(images, output_type="np") * 255).round().astype(int)


def test_bfloat16_is_as_exact_as_diffusers(tmp_path):
    vae, folder = saved(tmp_path)
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    exact = theirs(vae, latents)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.bfloat16)
    with torch.inference_mode():
        error = (decoder.decode(latents.bfloat16()) - exact).square().mean()
    bound = (theirs(copy.deepcopy(vae).bfloat16(), latents.bfloat16()) - exact).square().mean()
    assert error <= 1.1**2 * bound


def test_runs_on_the_ops_selected_for_its_device(tmp_path):
    from twinflow_rt.ops import Target, select

    _, folder = saved(tmp_path)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.float32)
    assert decoder.ops == decoder.network.ops == select(Target.of(CPU, torch.float32))[0]


def test_no_encoder_in_memory(tmp_path):
    vae, folder = saved(tmp_path)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.float32)
    count = sum(p.numel() for p in decoder.network.parameters())
    assert count == sum(p.numel() for n, p in vae.named_parameters() if n.startswith("decoder."))
    assert decoder.reports[0].bytes_read == 4 * count


@pytest.mark.parametrize(
    "change",
    [{"up_block_types": ["AttnUpDecoderBlock2D"]}, {"act_fn": "relu"}, {"latents_std": [1.0]}],
)
def test_other_decoders_are_refused(change):
    with pytest.raises(ConfigError, match=r"vae/config\.json"):
        AutoencoderConfig.from_dict({**VAE, **change})
