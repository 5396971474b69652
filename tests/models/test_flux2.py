"""FLUX.2-klein against diffusers: the network folded or not, the autoencoder, whole calls; what its parts refuse."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests import flux2_factory
from tests.memory import least
from tests.networks import context_of, folded, inputs, ours, relative, run, run_step
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.loading import load
from twinflow_rt.models.autoencoders import autoencoder_flux2
from twinflow_rt.models.transformers.flux2 import Flux2Config
from twinflow_rt.sampling.noise import initial_noise
from twinflow_rt.stages.vae import VaeDecoder

CPU = torch.device("cpu")
PROMPTS = ["a Red square! it's", "a big blue circle above a small green triangle, twice", ""]
ARGS = {"height": 24, "width": 40, "seed": 5, "output": "latent"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return flux2_factory.make_model(tmp_path_factory.mktemp("flux2") / "klein")


@pytest.fixture(scope="module")
def reference(folder):
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder, device="cpu")


def patches(vae, raw):
    """Raw latents as the model has them: patches of 2x2, normalised."""
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)[:, None, None]
    return (F.pixel_unshuffle(raw, 2) - vae.bn.running_mean[:, None, None]) / std


@pytest.mark.parametrize("shape", flux2_factory.SHAPES)
def test_network_equals_diffusers_folded_or_not(shape):
    reference, config = flux2_factory.TwinFlowReference(), flux2_factory.SMALL
    network, args = ours(reference.tensors(), config), inputs(shape, config)
    times = ((1.0, 1.0), (0.37, 0.37))
    tables = folded(reference.tensors(), config, times)
    for step, (t, _) in enumerate(times):
        expected = reference.velocity(args, t)
        assert relative(run(network, args, t, t), expected) < 1e-5
        assert relative(run_step(tables, args, step), expected) < 1e-5
    with pytest.raises(ConfigError, match="no second time embedder"):
        run(network, args, 1.0, 0.0)
    with pytest.raises(ConfigError, match="reads them all"):
        context_of(network, args._replace(lengths=(0,) * len(args.lengths)))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(64, 64), (24, 40)])
def test_calls_equal_diffusers(pipe, reference, steps, size):
    ours = pipe(PROMPTS, **ARGS | {"height": size[0], "width": size[1]}, nfe=steps).images
    noise = initial_noise([5, 6, 7], (16, size[0] // 8, size[1] // 8), torch.float32, CPU)
    with torch.no_grad():
        raw = reference(
            prompt=PROMPTS, height=size[0], width=size[1], num_inference_steps=steps, guidance_scale=1.0,
            latents=noise, output_type="latent",
        ).images  # fmt: skip
    assert relative(ours, patches(reference.vae, raw)) < 1e-5


def test_four_steps_are_the_default_and_many_tokens_have_a_shift_of_their_own(pipe):
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    from twinflow_rt.sampling.scheduler import flux2_mu

    assert len(pipe(PROMPTS[0], **ARGS) and pipe.program.schedule) == 4
    for tokens in (16, 4096, 4301, 65536):
        for steps in (1, 4, 50):
            assert flux2_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


def test_autoencoder_equals_diffusers_both_ways(folder, reference):
    vae, latents = reference.vae, torch.randn(2, 16, 5, 3, generator=torch.Generator().manual_seed(0))
    decoder = VaeDecoder(folder / "vae", autoencoder_flux2.MODEL)
    decoder.materialize(CPU, torch.float32)
    decoder.encoder.materialize(CPU, torch.float32)
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)[:, None, None]
    with torch.no_grad():
        raw = F.pixel_shuffle(latents * std + vae.bn.running_mean[:, None, None], 2)
        assert relative(decoder.decode(latents), vae.decode(raw).sample) < 1e-5
        image = torch.rand(1, 3, 40, 24) * 2 - 1
        expected = patches(vae, vae.encode(image).latent_dist.mode())
        assert relative(decoder.encoder.encode(image), expected) < 1e-5


def test_images_are_the_same_in_any_way_of_running(folder, pipe, tmp_path):
    expected = pipe(PROMPTS[:2], **ARGS).images
    budget = least(folder, device="cpu")
    streamed = load(folder, device="cpu", memory_budget=budget)
    assert streamed.memory.streamed and relative(streamed(PROMPTS[:2], **ARGS).images, expected) < 1e-5
    saved = load(pipe.save(tmp_path / "saved"), device="cpu")  # for the times of images of the default size
    size = ARGS | dict.fromkeys(("height", "width"), pipe.sizes.default)
    assert relative(saved(PROMPTS[0], **size).images, pipe(PROMPTS[0], **size).images) < 1e-5
    with pytest.raises(ConfigError, match="needs the checkpoint"):
        saved(PROMPTS[0], **ARGS)
    alone = pipe(PROMPTS[1], **ARGS | {"seed": 6}).images
    assert relative(alone, expected[1:]) < 1e-4


def test_pictures_are_taken(pipe):
    made = pipe(PROMPTS[0], image=torch.rand(1, 3, 24, 40), strength=0.5, seed=1, nfe=4)
    assert made.images[0].size == (40, 24)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_layers_run(tmp_path, precision):
    from twinflow_rt.bench.random_weights import skeleton

    folder = skeleton("flux2-klein", tmp_path / "m", scale=0.05, layers=2, dtype="float32")
    how = {"device": "cpu", "dtype": "float32"}
    args = {"height": 64, "width": 64, "seed": 0, "output": "latent", "nfe": 1}
    exact = load(folder, **how)("a red circle", **args).images
    pipe = load(folder, **how, precision=precision, text_precision=precision)
    assert any(group.kind == precision for group in pipe.plan.layers)
    error = (pipe("a red circle", **args).images - exact).norm() / exact.norm()
    assert error < {"int8": 0.05, "int4": 0.3}[precision]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes_dims_rope": [8, 8, 8]}, "four even numbers"), ({"num_single_layers": 0}, "some of both kinds"),
        ({"patch_size": 2}, "a multiple of 4"), ({"guidance_embeds": True}, "klein is what runs here"),
        ({"twinflow": True}, "no TwinFlow of FLUX.2"), ({"eps": 1e-5}, "FLUX.2 has 1, 256"),
    ],
)  # fmt: skip
def test_other_networks_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        Flux2Config.from_dict({**flux2_factory.SMALL.to_dict(), **changes})


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("vae", {"patch_size": [4, 4]}, "patches of 2x2"), ("vae", {"_class_name": "AutoencoderKL"}, "FLUX.2's VAE"),
        ("vae", {"decoder_block_out_channels": [8, 8, 8]}, "as wide as its encoder"),
        ("text_encoder", {"num_hidden_layers": 20}, "what leaves number 27"),
        ("text_encoder", {"hidden_size": 16}, "parts of two models"),
    ],
)  # fmt: skip
def test_other_parts_are_refused(folder, tmp_path, part, changes, words):
    broken = shutil.copytree(folder, tmp_path / "m")
    config = broken / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises((CheckpointError, ConfigError), match=words):
        load(broken, device="cpu")


def test_bfloat16_is_as_near_as_diffusers():
    config = replace(flux2_factory.SMALL, num_attention_heads=4)
    reference = flux2_factory.TwinFlowReference(config)
    args = inputs(flux2_factory.SHAPES[0], config)
    exact = reference.velocity(args, 0.6)
    half = {k: v if ".norm_" in k else v.bfloat16() for k, v in reference.tensors().items()}
    ours_half = run(ours(half, config), args.to(torch.bfloat16), 0.6, 0.6).float()
    with torch.no_grad():
        theirs = flux2_factory.TwinFlowReference(config)
        theirs.network.bfloat16()
        peer = theirs.velocity(args.to(torch.bfloat16), 0.6).float()
    assert (ours_half - exact).norm() <= 1.1 * (peer - exact).norm()
