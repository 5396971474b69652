"""Images from pictures, against diffusers' image-to-image and inpainting pipelines on the same files.

TwinFlow's second embedder vanishes at a target time tt = t (mode "multi"), so its checkpoints are there the ordinary
flow models that diffusers' pipelines run.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from functools import cache
from itertools import count

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.factory import make_model
from tests.networks import relative
from tests.pipelines.plain_models import peer_of, plain_model
from tests.pipelines.references import MODELS, PROMPTS, open_reference
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.loading import load
from twinflow_rt.sampling.noise import step_noise
from twinflow_rt.sampling.schedule import SamplerConfig, preset, schedule

PEERS = {
    "z-image": ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline", {"guidance_scale": 0.0}),
    "qwen-image": ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", {"true_cfg_scale": 1.0}),
    "sd3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline", {"guidance_scale": 0.0}),
}
SIZE = (48, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("pictures")
    options = {"sd3": {"channels": 16}}  # as diffusers' inpainting takes them
    return cache(lambda name: make_model(base / name, name, **options.get(name, {})))


@pytest.fixture(scope="module")
def pipe(folder):
    return cache(lambda name: load(folder(name), device="cpu"))


@pytest.fixture
def peer(folder, monkeypatch):
    """peer(family, which): diffusers' pipeline for pictures (0) or masks (1), which takes the mode of posteriors."""

    def make(name, which):
        kind = getattr(diffusers, PEERS[name][which])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = kind.from_pretrained(folder(name))
        made.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        made.set_progress_bar_config(disable=True)
        module = sys.modules[kind.__module__]
        theirs = module.retrieve_latents
        mode = lambda encoded, generator=None, sample_mode="argmax": theirs(encoded, generator, "argmax")
        monkeypatch.setattr(module, "retrieve_latents", mode)
        return made

    return make


def picture(size=SIZE, seed=0):
    """Smooth and colourful; height and width."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)


def stripes(size=SIZE):
    """A mask that is white on the left and not on the grid of latents."""
    pixels = np.zeros(size, np.uint8)
    pixels[:, : size[1] // 2 + 3] = 255
    return Image.fromarray(pixels)


@torch.no_grad()
def theirs(made, name, prompts, steps, strength, mask=None):
    """Latents [B, C, h, w], and all times of the schedule."""
    how = dict(PEERS[name][2], num_inference_steps=steps, strength=strength, output_type="latent")
    if mask is not None:
        how |= {"mask_image": mask, "height": SIZE[0], "width": SIZE[1]}
    elif name != "z-image":
        how |= {"height": SIZE[0], "width": SIZE[1]}
    generators = [torch.Generator().manual_seed(7 + k) for k in range(len(prompts))]
    out = made(prompt=list(prompts), image=[picture(seed=k) for k in range(len(prompts))], generator=generators, **how)
    latents = out.images
    if name == "qwen-image":
        latents = made._unpack_latents(latents, *SIZE, 8)[:, :, 0]
    return latents, tuple(made.scheduler.sigmas[:-1].tolist())


@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
@pytest.mark.parametrize("name", PEERS)
def test_equals_diffusers(pipe, peer, name, masked):
    made, mask = peer(name, int(masked)), stripes() if masked else None
    for steps, strength in ((1, 1.0), (4, 0.6), (4, 1.0), (5, 0.3)):
        prompts = PROMPTS[:2]
        expected, times = theirs(made, name, prompts, steps, strength, mask)
        ours = pipe(name)(
            list(prompts), image=[picture(seed=k) for k in range(2)], mask=mask, strength=strength, seed=7,
            sampler=SamplerConfig(times=times, mode="multi"), output="latent",
        ).images  # fmt: skip
        assert relative(ours, expected) < 1e-5, (steps, strength)


@pytest.mark.parametrize("name", ["z-image", "qwen-image", "sd3-without-t5", "sana-sprint"])
def test_plain_checkpoints_equal_diffusers(tmp_path, monkeypatch, name):
    """Without the second embedder, by the published scheduler; where diffusers guides with both, guided too."""
    kind = {"sana-sprint": "SanaSprintImg2ImgPipeline", "sd3-without-t5": PEERS["sd3"][0]}.get(name) or PEERS[name][0]
    model = plain_model(name, tmp_path / "m")
    ours, peer = load(model, device="cpu"), peer_of(name, model, kind)
    size = (64, 32) if name == "sana-sprint" else SIZE
    noise = lambda stream: step_noise([3], stream, (4, *(side // MODELS[name].scale for side in size)))
    for module in (type(peer).__module__, "diffusers.schedulers.scheduling_scm"):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **_: noise(next(drawn)).view(shape))
    if hasattr(module := sys.modules[type(peer).__module__], "retrieve_latents"):
        monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    how = dict(MODELS[name].call, output_type="latent")
    if name != "z-image":
        how |= {"height": size[0], "width": size[1]}
    guides = {"qwen-image": "true_cfg_scale", "sd3-without-t5": "guidance_scale"}.get(name)
    for steps, strength, scale in ((2, 0.5, None), (5, 0.3, None), (4, 0.6, guides and 3.0)):
        drawn = count()
        if name == "sana-sprint":
            how |= {"max_timesteps": 1.57080, "intermediate_timesteps": 1.3 if steps == 2 else None}
        guided = {} if scale is None else {"guidance": scale, "negative_prompt": "blue"}
        if guided:
            how |= {guides: scale, "negative_prompt": "blue"}
        with torch.no_grad():
            out = peer(PROMPTS[0], image=picture(size), strength=strength, num_inference_steps=steps, **how).images
        expected = peer._unpack_latents(out, *SIZE, 8)[:, :, 0] if name == "qwen-image" else out
        made = ours(
            PROMPTS[0], image=picture(size), strength=strength, nfe=steps, seed=3, output="latent", **guided
        ).images  # fmt: skip
        assert relative(made, expected) < 1e-5, (steps, strength)


@pytest.mark.parametrize("name", ["qwen-image", "sd3"])
@pytest.mark.parametrize("strength", [0.4, 0.9])
def test_one_evaluation_of_twinflow_equals_diffusers(folder, pipe, peer, name, strength):
    """x0 = x_t - t F(x_t, t, 0): an Euler step of diffusers' pipeline from that time, the second embedder hooked in."""
    made, reference = peer(name, 0), open_reference(name, folder(name))
    made.transformer, made.scheduler = reference.transformer, diffusers.FlowMatchEulerDiscreteScheduler()
    with torch.no_grad():
        out = made(
            prompt=PROMPTS[0], image=picture(), strength=1.0, num_inference_steps=1, sigmas=[strength],
            height=SIZE[0], width=SIZE[1], generator=torch.Generator().manual_seed(7), output_type="latent",
            **PEERS[name][2],
        ).images  # fmt: skip
    expected = made._unpack_latents(out, *SIZE, 8)[:, :, 0] if name == "qwen-image" else out
    ours = pipe(name)(PROMPTS[0], image=picture(), strength=strength, seed=7, nfe=1, output="latent").images
    assert relative(ours, expected) < 1e-5
    assert pipe(name).program.schedule == ((pytest.approx(strength), 0.0),)


def test_grids_are_drawn_together_and_start_at_the_strength():
    from twinflow_rt.sampling.schedule import started

    whole = schedule(preset(4), torch.float32)
    half = schedule(started(preset(4), 0.5), torch.float32)
    assert len(half) == len(whole) == 4 and half[0][0] == pytest.approx(0.5 * whole[0][0])
    assert [tt for _, tt in half] == [0.0] * 4
    assert started(preset(4), 1) is preset(4) or started(preset(4), 1) == preset(4)
    with pytest.raises(ConfigError, match="sampling_order 1"):
        started(SamplerConfig(4, sampling_order=2), 0.5)


@pytest.mark.parametrize("name", ["z-image", "qwen-image", "sd3", "sana", "sprint", "flux2"])
def test_pixels_outside_the_mask_are_the_pictures(pipe, name):
    image, mask, ours = picture(), stripes(), pipe(name)
    given, kept = np.asarray(image), np.asarray(mask) == 0
    made = ours("a", image=image, mask=mask, strength=0.8, seed=0, output="np", num_images=2).images
    assert made.shape == (2, *SIZE, 3)
    for one in made:
        assert np.array_equal(one[kept], given[kept]) and not np.array_equal(one[~kept], given[~kept])
    assert not np.array_equal(made[0][~kept], made[1][~kept])
    exact = ours("a", image=image, mask=mask, strength=0.8, seed=0, output="pt").images[0].movedim(0, -1)
    assert (exact[torch.from_numpy(kept)] - torch.from_numpy(given[kept] / 255)).abs().max() < 1e-6


def test_a_batch_is_its_images(pipe):
    """One picture for each prompt, two images of each; and one for all."""
    ours, images = pipe("z-image"), [picture(seed=1), picture(seed=2)]
    how = {"strength": 0.7, "output": "latent"}
    both = ours(PROMPTS[:2], image=images, num_images=2, seed=3, **how).images
    alone = [ours(PROMPTS[k // 2], image=images[k // 2], seed=3 + k, **how).images for k in range(4)]
    assert relative(both, torch.cat(alone)) < 1e-5
    each = ours(PROMPTS[0], image=[*images, images[0]], num_images=3, seed=3, **how).images
    assert relative(each[1:2], ours(PROMPTS[0], image=images[1], seed=4, **how).images) < 1e-5
    in_parts = ours(PROMPTS[:2], image=images, num_images=2, seed=3, on_oom="split", **how).images
    assert torch.equal(both, in_parts)


def test_the_picture_gives_the_size_and_is_read_as_any_kind(pipe, tmp_path):
    ours, image = pipe("z-image"), picture((50, 37))  # multiples of 8
    image.save(tmp_path / "a.png")
    pixels = np.asarray(image)
    first = ours("a", image=image, seed=0)
    assert first[0].size == (32, 48)
    for same in (tmp_path / "a.png", str(tmp_path / "a.png"), pixels, [image], pixels[None]):
        assert np.array_equal(np.asarray(ours("a", image=same, seed=0)[0]), np.asarray(first[0]))
    assert ours("a", image=image, seed=0, height=24, width=64)[0].size == (64, 24)
    assert set(first.timings) >= {"encode", "sample", "decode"}


def test_nothing_is_read_or_held_without_pictures(folder):
    ours = load(folder("z-image"), device="cpu")
    ours("a", seed=0)
    assert not ours.vae.encoder.reports and all(p.is_meta for p in ours.vae.encoder.network.parameters())
    assert any(note.startswith("pictures: encoder not read") for note in ours.plan.notes)
    ours("a", image=picture(), seed=0)
    assert any(note.startswith("pictures: encoder read") for note in ours.plan.notes)


def test_within_a_budget_the_encoder_comes_and_goes(folder):
    free = load(folder("z-image"), device="cpu")
    expected = free("a", image=picture((64, 64)), seed=0, output="latent").images
    budget = 2 * sum(p.numel() * 4 for p in free.program.network.parameters()) + 30_000_000
    ours = load(folder("z-image"), device="cpu", memory_budget=budget, largest=(64, 64, 1))
    assert relative(ours("a", image=picture((64, 64)), seed=0, output="latent").images, expected) < 1e-5
    assert not ours.vae.encoder.reports  # another one, unread
    ours.memory = replace(ours.memory, budget=sum(ours.memory.weights.values()) + 1000)
    with pytest.raises(ConfigError, match="leaves no room to encode a picture of 64x64"):
        ours("a", image=picture((64, 64)), seed=0)


def test_saved_programs_have_their_encoder(folder, tmp_path):
    ours = load(folder("qwen-image"), device="cpu", sampler=SamplerConfig(times=(0.6,)))
    expected = ours("a", image=picture(), strength=1, seed=0, output="latent").images
    again = load(ours.save(tmp_path / "saved"), device="cpu")
    assert torch.equal(again("a", image=picture(), strength=1, seed=0, output="latent").images, expected)
    with pytest.raises(ConfigError, match="load the model folder"):
        again("a", image=picture(), nfe=1, strength=0.5)


def test_files_without_an_encoder(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder("z-image"), tmp_path / "model")
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k.startswith("decoder.")}, file)
    ours = load(copy, device="cpu")
    assert any("no encoder" in note for note in ours.plan.notes)
    with pytest.raises(CheckpointError, match="no encoder in this VAE's files"):
        ours("a", image=picture())


def test_noise_is_that_of_text_to_image(pipe):
    """At strength 1 of one evaluation the picture has no part in the image."""
    ours = pipe("sana")
    assert torch.equal(
        ours("a", image=picture(), strength=1, seed=5, output="latent").images,
        ours("a", height=SIZE[0], width=SIZE[1], seed=5, output="latent").images,
    )
