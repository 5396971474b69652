"""SD3.5 from folder to pixels against diffusers' StableDiffusion3Pipeline on the same files."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import WEIGHTS
from tests.networks import relative
from tests.sd3_factory import add_second, make_model
from twinflow_rt import cli
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.reading import materialize
from twinflow_rt.errors import CheckpointError
from twinflow_rt.families import family_of
from twinflow_rt.loading import load
from twinflow_rt.planning.description import describe
from twinflow_rt.sampling.noise import initial_noise, step_noise
from twinflow_rt.sampling.sampler import preset, sample, schedule

PROMPTS = ["a Red square! it's", "a big blue circle above a small green triangle, twice", ""]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """With T5 and without."""
    folder = tmp_path_factory.mktemp("sd3")
    return {with_t5: make_model(folder / f"t5-{with_t5}", with_t5=with_t5) for with_t5 in (True, False)}


@pytest.fixture(scope="module")
def pipes(models):
    return {with_t5: load(folder, device="cpu") for with_t5, folder in models.items()}


def reference(folder, with_t5):
    """diffusers' pipeline, with TwinFlow's second embedder (which it lacks) hooked in for tt = 0."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        absent = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    stored, prefix = load_file(folder / "transformer" / WEIGHTS), "time_text_embed_2."
    config = pipe.transformer.config
    second = CombinedTimestepTextProjEmbeddings(pipe.transformer.inner_dim, config.pooled_projection_dim)
    second.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
    pipe.transformer.time_text_embed.register_forward_hook(add_second(second, 0.0))
    return pipe


@torch.no_grad()
def theirs(pipe, prompts, noise, output):
    """One Euler step of flow matching from t = 1 to 0: z - F, TwinFlow's single evaluation."""
    height, width = (4 * n for n in noise.shape[-2:])
    return pipe(
        list(prompts), height=height, width=width, num_inference_steps=1, guidance_scale=0.0, latents=noise.clone(),
        output_type=output,
    ).images  # fmt: skip


@pytest.mark.parametrize("with_t5", [True, False])
def test_equals_diffusers_pipeline(models, pipes, with_t5):
    peer, pipe = reference(models[with_t5], with_t5), pipes[with_t5]
    for prompts in (PROMPTS[:1], PROMPTS):
        for height, width in ((32, 32), (24, 64)):
            args = {"height": height, "width": width, "seed": 7}
            noise = initial_noise(range(7, 7 + len(prompts)), (4, height // 4, width // 4))
            latents = theirs(peer, prompts, noise, "latent")
            assert relative(pipe(prompts, output="latent", **args).images, latents) < 1e-5

            images = theirs(peer, prompts, noise, "np")
            assert images.std() > 0.05
            ours = pipe(prompts, output="pt", **args).images.permute(0, 2, 3, 1).numpy()
            assert np.abs(ours - images).max() < 1e-5
            pixels = pipe(prompts, output="np", **args).images
            assert pixels.dtype == np.uint8 and np.abs(pixels - (images * 255).round()).max() <= 1


@torch.no_grad()
def test_prompt_embeddings_equal_diffusers(models, pipes):
    """CLIP's tokens, then T5's or zeros; prompts longer than the encoders' limits lose their tail."""
    prompts = [*PROMPTS, "z " * 300]
    for with_t5 in (True, False):
        peer = reference(models[with_t5], with_t5)
        embeds, _, pooled, _ = peer.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
        ours = pipes[with_t5].text(prompts)
        assert ours.embeds.shape == (4, 12 + 256, 20) and ours.lengths == (268,) * 4
        assert relative(ours.embeds, embeds) < 1e-5 and relative(ours.extras["pooled"], pooled) < 1e-5
        assert with_t5 == bool(ours.embeds[:, 12:].any())


def test_repeated_prompts_equal_single_runs(pipes):
    """Contexts, modulation included, are computed once per prompt and repeated per image."""
    pipe, args = pipes[True], {"height": 16, "width": 24, "output": "latent"}
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    result = pipe(prompts, num_images=2, seed=10, **args)
    for k, prompt in enumerate(p for p in prompts for _ in range(2)):
        assert relative(result.images[k], pipe(prompt, seed=10 + k, **args).images[0]) < 1e-5


@pytest.mark.parametrize("config", [preset(2), preset(4, "any")])
def test_any_step_schedules_equal_the_sampler_on_the_unfolded_network(models, config):
    """RCGM's any-step checkpoints are the same networks, evaluated at (t, next t)."""
    pipe, checkpoint = load(models[False], device="cpu"), Checkpoint(models[False] / "transformer")
    family = family_of(checkpoint.config)
    with torch.device("meta"):
        network = family.network(family.config.from_dict(checkpoint.config))
    materialize(network, checkpoint, family.layout, CPU, torch.float32)
    times, shape, seeds = schedule(config, torch.float32), (4, 4, 6), [3, 4, 5]
    assert config.mode != "any" or [tt for _, tt in times] == [*(t for t, _ in times[1:]), 0.0]
    with torch.inference_mode():
        embeds = pipe.text(PROMPTS)
        context = network.encode_context(embeds.embeds, embeds.lengths, **embeds.extras)

        def velocity(latents, step):
            t, tt = (torch.tensor([x], dtype=torch.float64) for x in times[step])
            return network(latents, network.modulate(t, tt, context), context)

        expected = sample(
            velocity, initial_noise(seeds, shape), config, noise_fn=lambda i: step_noise(seeds, i, shape)
        )
    ours = pipe(PROMPTS, height=16, width=24, seed=3, sampler=config, output="latent").images
    assert relative(ours, expected) < 1e-5


def test_a_prompt_seen_before_is_modulated_for_each_schedule(models):
    """Whatever is kept of a prompt, another schedule has other constants."""
    pipe, args = load(models[False], device="cpu"), {"height": 16, "width": 16, "seed": 1, "output": "latent"}
    one, four = (pipe("x", nfe=nfe, **args).images for nfe in (1, 4))
    assert relative(four, load(models[False], device="cpu", nfe=4)("x", **args).images) < 1e-6
    assert relative(four, one) > 0.1 and relative(pipe("x", nfe=1, **args).images, one) < 1e-6


def test_a_lora_of_twinflows_targets_is_merged_before_folding(models, tmp_path):
    """TwinFlow's adapters for SD3.5 touch attention and both time embedders, of which folding leaves a table."""
    generator = torch.Generator().manual_seed(0)
    folder = shutil.copytree(models[False], tmp_path / "merged")
    file = folder / "transformer" / WEIGHTS
    tensors, factors = load_file(file), {}
    targets = [f"{e}.timestep_embedder.linear_{i}" for e in ("time_text_embed", "time_text_embed_2") for i in (1, 2)]
    for module in (*targets, "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_add_out"):
        weight = tensors[f"{module}.weight"]
        a, b = torch.randn(2, weight.shape[1], generator=generator), torch.randn(len(weight), 2, generator=generator)
        factors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
        tensors[f"{module}.weight"] = weight + 0.1 * b @ a
    save_file(tensors, file, metadata={"format": "pt"})
    save_file(factors, tmp_path / "lora.safetensors")
    args = {"height": 16, "width": 16, "seed": 1, "output": "latent"}
    base, merged = (load(model, device="cpu")("x", **args).images for model in (models[False], folder))
    ours = load(models[False], device="cpu", loras={tmp_path / "lora.safetensors": 0.1})("x", **args).images
    assert relative(ours, merged) < 1e-5 and relative(base, merged) > 1e-2


def test_an_artifact_gives_the_same_images(pipes, tmp_path):
    args = {"height": 16, "width": 16, "seed": 1, "output": "np"}
    saved = load(pipes[True].save(tmp_path / "artifact"), device="cpu")
    assert np.array_equal(saved(PROMPTS, **args).images, pipes[True](PROMPTS, **args).images)


def test_describes_itself(models, pipes, capsys):
    """`inspect` reads headers only; the plan counts each stage's work; both know all three encoders."""
    for with_t5, parts in ((True, 5), (False, 4)):
        description = describe(models[with_t5])
        assert description.family == "sd3.5" and len(description.parts) == parts
        assert cli.main(["inspect", str(models[with_t5])]) == 0
        assert "time_text_embed_2.timestep_embedder" in capsys.readouterr().out
        plan = pipes[with_t5].plan
        assert [stage.name for stage in plan.stages] == ["text", "context", "velocity", "decode"]
        assert all(stage.flops > 0 and stage.weight_bytes > 0 for stage in plan.stages)
        assert not plan.absorbed and "sd3.5" in str(plan)
    assert family_of({"_class_name": "SD3Transformer2DModel"}).name == "sd3.5"


def changed(model, tmp_path, part, **changes):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    path = folder / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_a_checkpoint_without_the_second_embedder_is_refused(models, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(models[False], folder)
    file = folder / "transformer" / WEIGHTS
    kept = {k: v for k, v in load_file(file).items() if not k.startswith("time_text_embed_2.")}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"time_text_embed_2 is missing: this is a plain SD3\.5"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        ("text_encoder_3/config.json", {"d_model": 16}, "text_encoder_3 d_model 16 does not fit"),
        ("text_encoder/config.json", {"projection_dim": 8}, "14 does not fit .* pooled_projection_dim 10"),
        ("text_encoder/config.json", {"hidden_size": 16}, "the 26 features of text_encoder and text_encoder_2 exceed"),
        ("vae/config.json", {"latent_channels": 16}, "vae latent_channels 16 does not fit"),
        ("text_encoder_2/config.json", {"vocab_size": 100}, "tokenizer_2 knows 516 tokens, .* embeds 100"),
    ],
)
def test_parts_of_other_models_are_refused(models, tmp_path, part, changes, match):
    with pytest.raises(CheckpointError, match=match):
        load(changed(models[True], tmp_path, part, **changes), device="cpu")


def test_skipping_t5_is_said_not_guessed(models, tmp_path):
    """A missing folder is an error; model_index.json says when T5 is to be left out, as diffusers writes it."""
    folder = tmp_path / "m"
    shutil.copytree(models[True], folder)
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(CheckpointError, match="text_encoder_3"):
        load(folder, device="cpu")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "text_encoder_3": [None, None]}))
    args = {"height": 16, "width": 16, "seed": 1, "output": "latent"}
    expected = load(models[False], device="cpu")(PROMPTS, **args).images
    assert torch.equal(load(folder, device="cpu")(PROMPTS, **args).images, expected)
