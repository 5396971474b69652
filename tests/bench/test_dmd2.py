"""DMD2 through diffusers, on a tiny SDXL with random weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from benches.peers import dmd2
from tests.factory import randomize
from tests.networks import relative
from tests.sd3_factory import clip_encoder, clip_tokenizer
from twinflow_rt.errors import CheckpointError

CPU = torch.device("cpu")
UNET = {
    **dmd2.UNET, "sample_size": 8, "block_out_channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "transformer_layers_per_block": (1, 1, 1), "attention_head_dim": (2, 2, 2), "cross_attention_dim": 18,
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 6,
}  # fmt: skip
VAE = {**dmd2.VAE, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SDXL base model as diffusers stores it."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    pipe = StableDiffusionXLPipeline(
        vae=randomize(AutoencoderKL(**VAE), 1), unet=randomize(UNet2DConditionModel(**UNET), 2),
        text_encoder=randomize(clip_encoder(8, 4, "quick_gelu", True), 3).text_model,
        tokenizer=clip_tokenizer("<|endoftext|>"),
        text_encoder_2=randomize(clip_encoder(10, 6, "gelu", True), 4), tokenizer_2=clip_tokenizer("!"),
        scheduler=EulerDiscreteScheduler(**dmd2.SCHEDULE),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("sdxl") / "m"
    pipe.save_pretrained(path)
    return path


@torch.inference_mode()
def test_one_evaluation_is_the_closed_form(folder):
    pipe, prompts = dmd2.load(folder, None, CPU, torch.float32), ["a cat", "two dogs"]
    latents = dmd2.images(pipe, prompts, 5, (32, 48), "latent")
    noise = torch.cat([torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(5 + k)) for k in range(2)])
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    sizes = torch.tensor([[32.0, 48, 0, 0, 32, 48]] * 2)
    eps = pipe.unet(noise, dmd2.TIMESTEP, embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    a = pipe.scheduler.alphas_cumprod[dmd2.TIMESTEP]
    assert relative(latents, (noise - (1 - a).sqrt() * eps) / a.sqrt()) < 1e-5
    assert dmd2.images(pipe, prompts, 5, (32, 48), "np").shape == (2, 32, 48, 3)


def test_takes_dmd2s_weights_from_either_kind_of_file(folder, tmp_path):
    from diffusers import UNet2DConditionModel

    tensors = randomize(UNet2DConditionModel(**UNET), 9).state_dict()
    save_file(tensors, tmp_path / "unet.safetensors")
    torch.save(tensors, tmp_path / "unet.bin")
    base = dmd2.images(dmd2.load(folder, None, CPU, torch.float32), ["x"], 0, (32, 32), "latent")
    given = [
        dmd2.images(dmd2.load(folder, tmp_path / name, CPU, torch.float32), ["x"], 0, (32, 32), "latent")
        for name in ("unet.safetensors", "unet.bin")
    ]
    assert torch.equal(*given) and relative(given[0], base) > 0.1
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is not a network of"):
        dmd2.load(folder, tmp_path / "other.safetensors", CPU, torch.float32)


def test_random_weights_need_no_file(capsys, monkeypatch):
    monkeypatch.setattr(dmd2, "UNET", UNET)
    monkeypatch.setattr(dmd2, "VAE", VAE)
    assert dmd2.main(["--random", "--size", "32", "--repeats", "2", "--device", "cpu", "--dtype", "float32"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["peer"] == "dmd2" and record["weights"] == "random" and not record["text_encoders"]
    assert record["seconds"] and record["machine"]


def test_the_published_network_has_2_57_billion_parameters():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(**dmd2.UNET)
    assert sum(p.numel() for p in network.parameters()) == 2_567_463_684
