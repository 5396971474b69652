"""The encoders of all families against diffusers' own."""

from __future__ import annotations

import pytest
import torch

from tests import flux2_factory, qwen_image_factory, sana_factory
from tests.factory import VAE, randomize, read
from twinflow_rt.errors import CheckpointError
from twinflow_rt.models.autoencoders import autoencoder_dc, autoencoder_flux2, autoencoder_kl, autoencoder_qwen
from twinflow_rt.stages import tiles
from twinflow_rt.stages.stage import StageOptions
from twinflow_rt.stages.vae import VaeDecoder

CPU = torch.device("cpu")
WIDE = {"block_out_channels": (96, 128), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2}  # of which convolutions become Winograd's  # fmt: skip


def kl(**changes):
    from diffusers import AutoencoderKL

    return randomize(AutoencoderKL(**{**VAE, **changes}), 0)


KINDS = {
    "kl": (kl, autoencoder_kl.MODEL),
    "kl with quant_conv, without attention": (
        lambda: kl(use_quant_conv=True, shift_factor=None, mid_block_add_attention=False, layers_per_block=2),
        autoencoder_kl.MODEL,
    ),
    "kl wide": (lambda: kl(**WIDE), autoencoder_kl.MODEL),
    "qwen": (qwen_image_factory.autoencoder, autoencoder_qwen.MODEL),
    "flux2": (flux2_factory.autoencoder, autoencoder_flux2.MODEL),
    "dc": (sana_factory.autoencoder, autoencoder_dc.MODEL),
    "dc strided": (lambda: sana_factory.autoencoder(downsample_block_type="conv"), autoencoder_dc.MODEL),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """diffusers' autoencoder, and the encoder here, read."""
    make, model = KINDS[request.param]
    vae, folder = make(), tmp_path_factory.mktemp("vae") / "vae"
    vae.save_pretrained(folder)
    return vae, read(VaeDecoder(folder, model).encoder)


def pictures(encoder, rows, columns, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, rows * encoder.scale, columns * encoder.scale, generator=generator) * 2 - 1


@torch.no_grad()
def theirs(vae, images):
    """Normalised latents, the mode of the posterior, as diffusers' pipelines of each family make them."""
    config, name = vae.config, type(vae).__name__
    if name == "AutoencoderDC":
        return vae.encode(images).latent * config.scaling_factor
    if name == "AutoencoderKL":
        return (vae.encode(images).latent_dist.mode() - (config.shift_factor or 0)) * config.scaling_factor
    if name == "AutoencoderKLFlux2":
        patches = torch.nn.functional.pixel_unshuffle(vae.encode(images).latent_dist.mode(), 2)
        mean, var = (value.view(-1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        return (patches - mean) / (var + config.batch_norm_eps).sqrt()
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (config.latents_mean, config.latents_std))
    return (vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std


@pytest.mark.parametrize("size", [(8, 8), (1, 5), (1, 1)])
def test_equals_diffusers(made, size):
    vae, encoder = made
    images = pictures(encoder, *size)
    with torch.inference_mode():
        ours, expected = encoder.encode(images), theirs(vae, images)
    assert ours.shape == expected.shape == (2, encoder.channels, *size)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_bfloat16_is_as_exact_as_diffusers(tmp_path):
    vae = kl()
    vae.save_pretrained(tmp_path / "vae")
    encoder = read(VaeDecoder(tmp_path / "vae", autoencoder_kl.MODEL).encoder, torch.bfloat16)
    images = pictures(encoder, 8, 12)
    exact = theirs(vae, images)
    with torch.inference_mode():
        error = (encoder.encode(images) - exact).square().mean()
        bound = (theirs(vae.bfloat16(), images.bfloat16()) - exact).square().mean()
    assert error <= 1.1**2 * bound


@pytest.mark.parametrize("size", [(40, 9), (21, 40)])
def test_in_tiles(made, size):
    """Exact but for the order of sums without group norms; with them the error of random weights is bounded."""
    _, encoder = made
    images, tile = pictures(encoder, *size), max(32, tiles.smallest(encoder.network))
    with torch.inference_mode():
        whole = encoder.network(images)
        trunk = encoder.network.trunk(encoder.network.head(images))
        calls: list[str] = []
        call = lambda name, function, x: (calls.append(name), function(x))[1]
        ours = tiles.encode(encoder.network, images, tile, call=call)
    assert torch.equal(whole, trunk) and ours.shape == whole.shape
    error = (ours - whole).abs().max() / whole.abs().max()
    assert error < (0.25 if tiles.blends(encoder.network) else 1e-5)
    assert calls.count("trunk") == 2 and calls.count("tile") > 2


def test_convolutions_are_converted(made):
    """Wide ones become Winograd's and the others are packed, as a decoder's are."""
    _, encoder = made
    kinds = {group.kind for group in encoder.convolutions}
    assert kinds and kinds <= {"packed", "winograd"}
    if encoder.config.__class__.__name__ == "AutoencoderConfig" and max(encoder.config.block_out_channels) >= 96:
        assert "winograd" in kinds


def test_nothing_is_read_before_a_picture_comes(tmp_path):
    kl().save_pretrained(tmp_path / "vae")
    decoder = read(VaeDecoder(tmp_path / "vae", autoencoder_kl.MODEL))
    assert "encoder" not in vars(decoder) and not decoder.encoder.reports
    assert all(p.is_meta for p in decoder.encoder.network.parameters())
    decoder.encoder.materialize(CPU, torch.float32, StageOptions())
    assert decoder.encoder.reports[0].bytes_read


@pytest.mark.parametrize("kind", ["kl", "qwen", "flux2", "dc"])
def test_files_without_an_encoder_say_so(tmp_path, kind):
    from safetensors.torch import load_file, save_file

    make, model = KINDS[kind]
    make().save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith(("encoder.", "quant_conv."))}, file)
    decoder = read(VaeDecoder(tmp_path / "vae", model))
    with pytest.raises(CheckpointError, match="no encoder in this VAE's files"):
        decoder.encoder.materialize(CPU, torch.float32)
