"""The one-frame decoder against diffusers' AutoencoderKLQwenImage, a VAE for video.

Their float32 results differ in the last bits where the library's 3D and 2D convolutions sum in
different orders (oneDNN: most shapes), so bits are compared where sums are exact."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.factory import read
from tests.qwen_image_factory import VAE, autoencoder
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.models.autoencoders.autoencoder_qwen import MODEL, QwenAutoencoderConfig
from twinflow_rt.ops import EAGER
from twinflow_rt.ops.selection import Choice
from twinflow_rt.passes.convolutions import fold_upsampling
from twinflow_rt.passes.layers import unpack
from twinflow_rt.planning.footprint import work_of
from twinflow_rt.stages.vae import VaeDecoder

CPU = torch.device("cpu")
VARIANTS = [
    {},
    {"temperal_downsample": [True, False, True], "num_res_blocks": 2},
    {"dim_mult": [1, 2], "temperal_downsample": [True], "base_dim": 12, "z_dim": 3, "latents_mean": [0.1, 0.2, 0.3],
     "latents_std": [1.1, 0.9, 0.7]},
]  # fmt: skip
WIDE = {"base_dim": 96, "dim_mult": [1, 2], "temperal_downsample": [True]}  # convolutions become Winograd's
RELEASED = {
    "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16,
}  # fmt: skip


def saved(tmp_path, **changes):
    vae = autoencoder(**changes)
    vae.save_pretrained(tmp_path / "vae")
    return vae, tmp_path


@torch.inference_mode()
def theirs(vae, latents):
    """As QwenImagePipeline decodes."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(vae.dtype)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(vae.dtype)
    return vae.decode((latents[:, :, None].to(vae.dtype) / std + mean), return_dict=False)[0][:, :, 0]


def random_latents(vae, *size, batch=2):
    return torch.randn(batch, vae.config.z_dim, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", [*VARIANTS, WIDE])
@pytest.mark.parametrize("size", [(12, 12), (2, 10), (1, 1)])
def test_equals_diffusers(tmp_path, changes, size):
    vae, folder = saved(tmp_path, **changes)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.float32)
    latents = random_latents(vae, *size)
    with torch.inference_mode():
        image = decoder.decode(latents)
    expected = theirs(vae, latents)
    assert image.shape == expected.shape == (2, 3, size[0] * decoder.scale, size[1] * decoder.scale)
    assert expected.abs().max() > 0.1
    assert (image.clamp(-1, 1) - expected).abs().max() < 1e-5 * expected.abs().max()  # the reference clamps


@pytest.mark.parametrize("changes", VARIANTS)
def test_equals_diffusers_to_the_last_digits_of_float64(tmp_path, changes, monkeypatch):
    """Nothing is approximated: in float64 only the order of sums is left."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageUpsample

    monkeypatch.setattr(QwenImageUpsample, "forward", torch.nn.Upsample.forward)  # else through float32
    vae, folder = saved(tmp_path, **changes)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.float32)
    rms_norm = lambda x, w, eps: F.normalize(x, dim=-1) * len(w) ** 0.5 * w
    silu = lambda x, w, eps: F.silu(rms_norm(x.permute(0, 2, 3, 1), w, eps)).permute(0, 3, 1, 2)
    decoder.network.ops = replace(EAGER, rms_norm=rms_norm, rms_norm_silu=silu)
    latents = random_latents(vae, 6, 10)
    raw = (latents / decoder._divisor + decoder._offset).double()
    with torch.inference_mode():
        expected = vae.double().decode(raw[:, :, None], return_dict=False)[0][:, :, 0]
        unpack(decoder.network)
        network = decoder.network.double()
        fold_upsampling(network, (Choice("upsample_conv", "folded"),))  # anew, from weights in float64
        assert (network(raw).clamp(-1, 1) - expected).abs().max() < 1e-13


@pytest.mark.parametrize("channels", [(4, 32), (16, 16), (96, 192)])
def test_one_frame_sees_one_tap_bit_for_bit(channels):
    """With small integers every order of summation is exact, so equal means equal bits."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    conv = QwenImageCausalConv3d(*channels, 3, padding=1)
    generator = torch.Generator().manual_seed(0)
    for p in conv.parameters():
        p.data = torch.randint(-4, 5, p.shape, generator=generator).float()
    x = torch.randint(-4, 5, (2, channels[0], 1, 5, 7), generator=generator).float()
    for order in (torch.contiguous_format, torch.channels_last):
        frame, kernel = x[:, :, 0].to(memory_format=order), conv.weight[:, :, -1].to(memory_format=order)
        assert torch.equal(F.conv2d(frame, kernel, conv.bias, padding=1), conv(x)[:, :, 0])


def test_bfloat16_is_as_exact_as_diffusers(tmp_path):
    vae, folder = saved(tmp_path)
    latents = random_latents(vae, 8, 12)
    exact = theirs(vae, latents)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.bfloat16)
    with torch.inference_mode():
        image = decoder.decode(latents.bfloat16())
    bound = (theirs(copy.deepcopy(vae).bfloat16(), latents.bfloat16()) - exact).square().mean()
    assert image.dtype == torch.bfloat16
    assert (image.clamp(-1, 1) - exact).square().mean() <= 1.1**2 * bound


def test_one_tap_of_three_is_kept(tmp_path):
    """Parameters: those of the reference's decoder, less two temporal taps of three and the
    convolutions that double the frames."""
    vae, folder = saved(tmp_path)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.float32)
    kept = 0
    for name, p in vae.named_parameters():
        if name.startswith(("decoder.", "post_quant_conv.")) and "time_conv" not in name:
            kept += p.numel() // (p.shape[2] if p.ndim == 5 else 1)
    assert sum(p.numel() for p in decoder.network.parameters()) == kept
    report = decoder.reports[0]
    assert report.bytes_read + report.bytes_unused == 4 * sum(p.numel() for p in vae.parameters())
    conv = decoder.network.state_dict()["decoder.conv_in.weight"]
    assert torch.equal(conv, vae.decoder.conv_in.weight[:, :, -1])


def test_saved_in_two_dimensions_loads_as_it_is(tmp_path):
    from safetensors.torch import save_file

    vae, folder = saved(tmp_path)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.float32)
    weights = {k: v.contiguous() for k, v in decoder.parts[0].weights().items()}
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})
    again = read(VaeDecoder(folder / "vae", MODEL), torch.float32)
    latents = random_latents(vae, 4, 4)
    assert torch.equal(again.decode(latents), decoder.decode(latents))


def test_work_saved_at_the_released_size():
    """FLOPs of one 1024 x 1024 image, counted on the meta device: 11.68 T as video, 4.71 T as one frame."""
    from diffusers import AutoencoderKLQwenImage

    config = QwenAutoencoderConfig.from_dict({"_class_name": "AutoencoderKLQwenImage", **RELEASED})
    with torch.device("meta"):
        video = AutoencoderKLQwenImage(**RELEASED)
        image = MODEL.network(config)
        latents = torch.empty(1, 16, 128, 128)
    before = work_of(lambda: video.decode(latents[:, :, None], return_dict=False)).flops
    after = work_of(lambda: image(latents)).flops
    assert (round(before / 1e12, 2), round(after / 1e12, 2)) == (11.68, 4.71)
    assert sum(p.numel() for p in video.parameters()) == 126_892_531
    assert sum(p.numel() for p in image.parameters()) == 25_291_955


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "an AutoencoderKLQwenImage"),
        ({"input_channels": 4}, "4 image channels"),
        ({"latents_std": [1.0]}, "must have z_dim = 4 entries"),
        ({"temperal_downsample": [True]}, "one entry less than dim_mult"),
    ],
)
def test_other_decoders_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        QwenAutoencoderConfig.from_dict({"_class_name": "AutoencoderKLQwenImage", **VAE, **change})
    with pytest.raises(ConfigError, match="lacks 'z_dim'"):
        QwenAutoencoderConfig.from_dict({"_class_name": "AutoencoderKLQwenImage", "base_dim": 8})


def test_a_missing_tensor_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    _, folder = saved(tmp_path)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.norm_out.gamma"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing decoder\.norm_out\.gamma"):
        read(VaeDecoder(folder / "vae", MODEL), torch.float32)
