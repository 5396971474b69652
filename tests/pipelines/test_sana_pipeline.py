"""SANA and SANA-Sprint from folder to pixels against diffusers' pipelines on the same files."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import WEIGHTS
from tests.networks import relative
from tests.sana_factory import (
    CONNECTOR,
    SMALL,
    SPRINT,
    add_second,
    language_model,
    make_model,
    make_openuni,
    siglip_encoder,
)
from twinflow_rt import cli
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.reading import materialize
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.families import family_of
from twinflow_rt.loading import load
from twinflow_rt.planning.description import describe
from twinflow_rt.sampling.noise import initial_noise, step_noise
from twinflow_rt.sampling.sampler import SamplerConfig, preset, sample, schedule
from twinflow_rt.stages.text_encoders import INSTRUCTION

PROMPTS = ["a Red square! it's", "a big blue circle above a small green triangle, twice", ""]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sana")
    return {name: make_model(folder / name, config) for name, config in (("sana", SMALL), ("sprint", SPRINT))}


@pytest.fixture(scope="module")
def pipes(models):
    return {name: load(folder, device="cpu") for name, folder in models.items()}


@pytest.fixture(scope="module")
def references(models):
    """diffusers' pipelines, SANA's with TwinFlow's second embedder (which it lacks) hooked in for tt = 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaSprintPipeline
    from diffusers.models.normalization import AdaLayerNormSingle

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sana = SanaPipeline.from_pretrained(models["sana"])
        sprint = SanaSprintPipeline.from_pretrained(models["sprint"])
    sana.scheduler = FlowMatchEulerDiscreteScheduler()  # its first step from t = 1 to 0 is TwinFlow's one evaluation
    stored, prefix = load_file(models["sana"] / "transformer" / WEIGHTS), "time_embed_2."
    second = AdaLayerNormSingle(sana.transformer.proj_out.in_features)
    second.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
    sana.transformer.time_embed.register_forward_hook(add_second(second, 0.0), with_kwargs=True)
    for pipe in (sana, sprint):
        pipe.set_progress_bar_config(disable=True)
    return {"sana": sana, "sprint": sprint}


@torch.no_grad()
def theirs(references, name, prompts, noise, output, **more):
    height, width = (4 * n for n in noise.shape[-2:])
    if name == "sana":
        more["guidance_scale"] = 0.0
    else:  # from pi / 2 itself, which its default of 1.57080 misses by 4e-6
        more["max_timesteps"] = math.pi / 2
        if more.get("num_inference_steps", 1) == 1:
            more["intermediate_timesteps"] = None
    return references[name](
        list(prompts), height=height, width=width, **{"num_inference_steps": 1, **more}, latents=noise.clone(),
        use_resolution_binning=False, output_type=output,
    ).images  # fmt: skip


@pytest.mark.parametrize("name", ["sana", "sprint"])
def test_equals_diffusers_pipeline(pipes, references, name):
    for prompts in (PROMPTS[:1], PROMPTS):
        for height, width in ((32, 32), (64, 32)):
            args = {"height": height, "width": width, "seed": 7}
            noise = initial_noise(range(7, 7 + len(prompts)), (4, height // 4, width // 4))
            latents = theirs(references, name, prompts, noise, "latent")
            assert relative(pipes[name](prompts, output="latent", **args).images, latents) < 1e-5

            images = theirs(references, name, prompts, noise, "np")
            assert images.std() > 0.05
            ours = pipes[name](prompts, output="pt", **args).images.permute(0, 2, 3, 1).numpy()
            assert np.abs(ours - images).max() < 1e-5
            pixels = pipes[name](prompts, output="np", **args).images
            assert pixels.dtype == np.uint8 and np.abs(pixels - (images * 255).round()).max() <= 1


def test_sprint_in_two_steps_is_ucgm_with_fresh_noise(pipes, references):
    """Its published schedule, angles pi/2 and 1.3, is a grid of two times of the linear flow."""
    pipe, shape = pipes["sprint"], (4, 8, 8)
    time = math.sin(1.3) / (math.sin(1.3) + math.cos(1.3))
    config = SamplerConfig(2, stochast_ratio=1.0, rfba_gap_steps=(0.0, time))
    assert schedule(config, torch.float32) == ((1.0, 0.0), (pytest.approx(time), 0.0))
    noise, fresh = initial_noise([1, 2], shape), torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    expected = theirs(
        references, "sprint", PROMPTS[:2], noise, "latent", num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    with torch.inference_mode():
        pipe.program.refold(schedule(config, torch.float32))
        network, embeds = pipe.program.network, pipe.text(PROMPTS[:2])
        context = network.encode_context(embeds.embeds, embeds.lengths)
        velocity = lambda x, step: network(x, network.step_modulation(step), context)
        ours = sample(velocity, noise, config, noise_fn=lambda step: fresh)
    assert relative(ours, expected) < 1e-5


@torch.no_grad()
def test_prompt_embeddings_equal_diffusers(pipes, references):
    """The instruction is diffusers'; a prompt has its own length here; the longest lose their tail."""
    peer, prompts = references["sana"], [*PROMPTS, "z" * 400]
    default = inspect.signature(type(peer).__call__).parameters["complex_human_instruction"].default
    assert "\n".join(default) == INSTRUCTION
    embeds, mask, _, _ = peer.encode_prompt(prompts, False, complex_human_instruction=default)
    ours = pipes["sana"].text(prompts)
    assert ours.lengths == tuple(mask.sum(1).tolist()) and ours.lengths[2:] == (2, 300)
    for i, n in enumerate(ours.lengths):
        assert relative(ours.embeds[i, :n], embeds[i, :n]) < 1e-5


def test_repeated_and_ragged_prompts_equal_single_runs(pipes):
    """Keys and values are computed once per prompt and repeated per image, lengths and mask with them."""
    args = {"height": 16, "width": 24, "output": "latent"}
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    result = pipes["sana"](prompts, num_images=2, seed=10, **args)
    for k, prompt in enumerate(p for p in prompts for _ in range(2)):
        assert relative(result.images[k], pipes["sana"](prompt, seed=10 + k, **args).images[0]) < 1e-5


@pytest.mark.parametrize("config", [preset(2), preset(4, "any")])
def test_any_step_schedules_equal_the_sampler_on_the_unfolded_network(models, config):
    """RCGM's any-step checkpoints are the same networks, evaluated at (t, next t)."""
    pipe, checkpoint = load(models["sana"], device="cpu"), Checkpoint(models["sana"] / "transformer")
    family = family_of(checkpoint.config)
    with torch.device("meta"):
        network = family.network(family.config.from_dict(checkpoint.config))
    materialize(network, checkpoint, family.layout, CPU, torch.float32)
    times, shape, seeds = schedule(config, torch.float32), (4, 4, 6), [3, 4, 5]
    assert config.mode != "any" or [tt for _, tt in times] == [*(t for t, _ in times[1:]), 0.0]
    with torch.inference_mode():
        embeds = pipe.text(PROMPTS)
        context = network.encode_context(embeds.embeds, embeds.lengths)

        def velocity(latents, step):
            t, tt = (torch.tensor([x], dtype=torch.float64) for x in times[step])
            return network(latents, network.modulate(t, tt), context)

        expected = sample(velocity, initial_noise(seeds, shape), config, noise_fn=lambda i: step_noise(seeds, i, shape))
    ours = pipe(PROMPTS, height=16, width=24, seed=3, sampler=config, output="latent").images
    assert relative(ours, expected) < 1e-5


@pytest.mark.parametrize("name", ["sana", "sprint"])
def test_an_artifact_gives_the_same_images(models, name, tmp_path):
    args, pipe = {"height": 16, "width": 16, "seed": 1, "output": "np"}, load(models[name], device="cpu")
    saved = load(pipe.save(tmp_path / "artifact"), device="cpu")
    assert saved.plan.absorbed
    assert np.array_equal(saved(PROMPTS, **args).images, pipe(PROMPTS, **args).images)


@pytest.mark.parametrize("name", ["sana", "sprint"])
def test_describes_itself(models, pipes, name, capsys):
    description = describe(models[name])
    assert description.family == "sana"
    assert [part.name for part in description.parts] == ["text_encoder", "transformer", "vae"]
    assert cli.main(["inspect", str(models[name])]) == 0
    assert "scale_shift_table" in capsys.readouterr().out
    plan = load(models[name], device="cpu").plan
    assert [stage.name for stage in plan.stages] == ["text", "context", "velocity", "decode"]
    assert all(stage.flops > 0 and stage.weight_bytes > 0 for stage in plan.stages)
    assert plan.absorbed and plan.family == "sana"
    assert pipes[name].sizes.resolve(None, None) == (8, 8)
    with pytest.raises(ConfigError, match="height 18 must be a multiple of 4 from 4 to 4096; the nearest is 16"):
        pipes[name]("x", height=18)


def test_a_checkpoint_without_the_second_embedder_is_refused(models, tmp_path):
    folder = shutil.copytree(models["sana"], tmp_path / "m")
    file = folder / "transformer" / WEIGHTS
    kept = {k: v for k, v in load_file(file).items() if not k.startswith("time_embed_2.")}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="time_embed_2 is missing: this is a plain SANA"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        ("text_encoder", {"hidden_size": 16}, "width of prompt embeddings 16 does not fit"),
        ("vae", {"latent_channels": 8}, "vae latent_channels 8 does not fit"),
        ("text_encoder", {"vocab_size": 100}, "tokenizer knows 600 tokens, .* embeds 100"),
    ],
)
def test_parts_of_other_models_are_refused(models, tmp_path, part, changes, match):
    folder = shutil.copytree(models["sana"], tmp_path / "m")
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=match):
        load(folder, device="cpu")


# -- OpenUni: SANA behind a language model with learned queries -------------------------------------


@pytest.fixture(scope="module")
def openuni(tmp_path_factory):
    return make_openuni(tmp_path_factory.mktemp("openuni") / "m")


@torch.no_grad()
def test_openuni_embeddings_equal_its_parts_in_transformers(openuni):
    """As upstream runs it: prompts padded, masked, positions counted over what is not padding, queries last."""
    folder, tensors = openuni
    language, connector = language_model().model, siglip_encoder()
    text = load(folder, device="cpu").text
    rendered = text.tokenizer.render("a cat")
    assert rendered == "<|im_start|>user\nGenerate an image: a cat<|im_end|>\n<|im_start|>assistant\n<img>"
    ids = text.tokenizer(PROMPTS, 2048)
    longest, count = max(map(len, ids)), CONNECTOR.num_queries
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) + [1] * count for i in ids])
    padded = torch.tensor([i + [0] * (longest - len(i)) for i in ids])
    queries = tensors["meta_queries"].expand(len(ids), -1, -1)
    embeds = torch.cat((language.embed_tokens(padded), queries), 1)
    states = language(inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    states = connector(inputs_embeds=states.last_hidden_state[:, -count:]).last_hidden_state
    expected = states @ tensors["projector.weight"].T + tensors["projector.bias"]
    ours = text(PROMPTS)
    assert ours.lengths == (count,) * 3 and relative(ours.embeds, expected) < 1e-5


def test_openuni_from_folder_to_pixels(openuni, tmp_path):
    """The network and decoder are SANA's, so only the prompt's way to them differs."""
    pipe, args = load(openuni[0], device="cpu"), {"height": 16, "width": 24, "seed": 1, "output": "np"}
    images = pipe(PROMPTS, **args).images
    assert images.std() > 5 and not np.array_equal(images[0], images[1])
    assert np.array_equal(pipe(pipe.text(PROMPTS), **args).images, images)
    assert np.array_equal(load(pipe.save(tmp_path / "artifact"), device="cpu")(PROMPTS, **args).images, images)
    assert [part.name for part in describe(openuni[0]).parts] == ["text_encoder", "connector", "transformer", "vae"]
    assert all(stage.flops > 0 for stage in pipe.plan.stages)


def test_openuni_takes_internvl_as_it_is(openuni, tmp_path):
    """Config and names of a whole InternVLChatModel: its vision tower is not read."""
    folder = shutil.copytree(openuni[0], tmp_path / "m")
    file, path = folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "config.json"
    tensors = {f"language_model.{k}": v for k, v in load_file(file).items()}
    save_file({**tensors, "vision_model.x": torch.zeros(2), "mlp1.0.weight": torch.zeros(2)}, file)
    path.write_text(json.dumps({"model_type": "internvl_chat", "llm_config": json.loads(path.read_text())}))
    ours, expected = (load(f, device="cpu").text(PROMPTS).embeds for f in (folder, openuni[0]))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("part", "changes", "error", "match"),
    [
        ("connector", {"hidden_size": 24}, CheckpointError, "does not fit the connector's hidden_size 24"),
        ("connector", {"caption_channels": 8}, CheckpointError, "width of prompt embeddings 8 does not fit"),
        ("connector", {"hidden_act": "relu"}, ConfigError, "activation 'relu'"),
        ("connector", {"num_queries": 9}, CheckpointError, "meta_queries"),
        ("text_encoder", {"model_type": "llama"}, ConfigError, "model_type 'llama'"),
    ],
)
def test_other_openuni_parts_are_refused(openuni, tmp_path, part, changes, error, match):
    folder = shutil.copytree(openuni[0], tmp_path / "m")
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(error, match=match):
        load(folder, device="cpu")
