"""Every family from folder to pixels, against diffusers' pipeline on the same files."""

from __future__ import annotations

import inspect
import json
import shutil
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.factory import WEIGHTS
from tests.networks import relative
from tests.pipelines.references import MODELS, PROMPTS, images_of, open_reference
from twinflow_rt import cli
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.fuse import sources
from twinflow_rt.checkpoint.reading import materialize
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.families import family_of
from twinflow_rt.loading import load
from twinflow_rt.planning.description import describe
from twinflow_rt.planning.work import PROMPT_TOKENS
from twinflow_rt.sampling.noise import initial_noise, step_noise
from twinflow_rt.sampling.sampler import sample
from twinflow_rt.sampling.schedule import SamplerConfig, preset, schedule

CPU = torch.device("cpu")
LATER = ["qwen-image", "sd3", "sana"]
# family, its networks, a line of `inspect`, the default size, a height that is refused and why
DESCRIBED = {
    "qwen-image": ("qwen-image", 3, "qwen-image", 1328, 20, "a multiple of 16 from 16 to 4096; the nearest is 16"),
    "sd3": ("sd3.5", 5, "time_text_embed_2.timestep_embedder", None, None, ""),
    "sd3-without-t5": ("sd3.5", 4, "time_text_embed_2.timestep_embedder", None, None, ""),
    "sana": ("sana", 3, "scale_shift_table", 8, 18, "a multiple of 4 from 4 to 4096; the nearest is 16"),
    "sana-sprint": ("sana", 3, "scale_shift_table", 8, 18, "a multiple of 4 from 4 to 4096; the nearest is 16"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(name): that miniature, made once."""
    base = tmp_path_factory.mktemp("families")
    return cache(lambda name: MODELS[name].make(base / name))


@pytest.fixture(scope="module")
def pipe(folder):
    """pipe(name): that miniature, loaded once, for one evaluation (SANA-Sprint's own number is two)."""
    return cache(lambda name: load(folder(name), device="cpu", nfe=1))


@pytest.mark.parametrize("name", MODELS)
def test_equals_diffusers_pipeline(folder, pipe, name):
    peer, ours, model = open_reference(name, folder(name)), pipe(name), MODELS[name]
    for prompts, size, seed in product((PROMPTS[:1], PROMPTS), model.sizes, (0, 7) if name == "z-image" else (7,)):
        args = {"height": size[0], "width": size[1], "seed": seed}
        noise = initial_noise(range(seed, seed + len(prompts)), (4, *(n // model.scale for n in size)))
        latents = images_of(name, peer, prompts, size, "latent", noise)
        assert relative(ours(prompts, output="latent", **args).images, latents) < 1e-5

        images = images_of(name, peer, prompts, size, "np", noise)
        assert images.std() > 0.05
        assert np.abs(ours(prompts, output="pt", **args).images.permute(0, 2, 3, 1).numpy() - images).max() < 1e-5
        pixels = ours(prompts, output="np", **args).images
        assert pixels.dtype == np.uint8 and np.abs(pixels - (images * 255).round()).max() <= 1
        pil = ours(prompts, **args).images
        assert [i.size for i in pil] == [size[::-1]] * len(prompts)
        assert np.array_equal(np.stack([np.asarray(i) for i in pil]), pixels)


@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_seeds_make_diffusers_noise(folder, pipe, name):
    """Image k is what diffusers draws with a CPU generator seeded seed + k."""
    generators, peer = [torch.Generator().manual_seed(40 + k) for k in range(2)], open_reference(name, folder(name))
    theirs = images_of(name, peer, PROMPTS[:2], (32, 48), "latent", generator=generators)
    assert relative(pipe(name)(PROMPTS[:2], height=32, width=48, seed=40, output="latent").images, theirs) < 1e-5


@pytest.mark.parametrize("name", LATER)
def test_repeated_and_ragged_prompts_equal_single_runs(pipe, name):
    """Contexts are computed once per prompt and repeated per image, lengths, masks and modulation with them."""
    args, prompts = {"height": 16, "width": 32, "output": "latent"}, [PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    result = pipe(name)(prompts, num_images=2, seed=10, **args)
    for k, prompt in enumerate(p for p in prompts for _ in range(2)):
        assert relative(result.images[k], pipe(name)(prompt, seed=10 + k, **args).images[0]) < 1e-5


@pytest.mark.parametrize("config", [preset(2), preset(4, "any"), SamplerConfig(3, sampling_order=2, mode="any")])
@pytest.mark.parametrize("name", ["z-image", "qwen-image", "sd3-without-t5", "sana"])
def test_more_steps_equal_the_sampler_on_the_unfolded_network(folder, name, config):
    """RCGM's any-step checkpoints are the same networks, evaluated at (t, next t)."""
    ours, checkpoint = load(folder(name), device="cpu"), Checkpoint(folder(name) / "transformer")
    family = family_of(checkpoint.config)
    with torch.device("meta"):
        network = family.network(family.config.from_dict(checkpoint.config))
    materialize(network, checkpoint, family.layout, CPU, torch.float32)
    times, seeds = schedule(config, torch.float32), [3, 4, 5]
    shape = (4, 16 // ours.vae.scale, 32 // ours.vae.scale)
    assert config.mode != "any" or [tt for _, tt in times] == [*(t for t, _ in times[1:]), 0.0]
    by_prompt = "context" in inspect.signature(network.modulate).parameters
    with torch.inference_mode():
        embeds = ours.text(PROMPTS)
        context = network.encode_context(embeds.embeds, embeds.lengths, **embeds.extras)

        def velocity(latents, step):
            t, tt = (torch.tensor([x], dtype=torch.float64) for x in times[step])
            return network(latents, network.modulate(t, tt, *[context] * by_prompt), context)

        expected = sample(velocity, initial_noise(seeds, shape), config, noise_fn=lambda i: step_noise(seeds, i, shape))
    images = ours(PROMPTS, height=16, width=32, seed=3, sampler=config, output="latent").images
    assert relative(images, expected) < 1e-5


@pytest.mark.parametrize(("name", "bar"), [("qwen-image", 1e-5), ("sd3-without-t5", 1e-6)])
def test_another_schedule_has_other_constants(folder, name, bar):
    """Whatever is kept of a prompt; and going back to one step gives the image that absorbed weights gave."""
    ours, args = load(folder(name), device="cpu"), {"height": 16, "width": 16, "seed": 1, "output": "latent"}
    one, four = (ours("x", nfe=nfe, **args).images for nfe in (1, 4))
    assert relative(four, load(folder(name), device="cpu", nfe=4)("x", **args).images) < bar
    assert relative(four, one) > 0.1 and relative(ours("x", **args).images, one) < bar


@pytest.mark.parametrize("name", ["qwen-image", "sd3", "sana", "sana-sprint"])
def test_an_artifact_gives_the_same_images(folder, name, tmp_path):
    args, ours = {"height": 16, "width": 32, "seed": 3, "output": "np"}, load(folder(name), device="cpu", nfe=1)
    saved = load(ours.save(tmp_path / "artifact"), device="cpu")
    assert saved.plan.absorbed == (name != "sd3")
    assert np.array_equal(saved(PROMPTS, **args).images, ours(PROMPTS, **args).images)
    names = load_file(tmp_path / "artifact" / "text_encoder" / "model.safetensors")
    assert not any(name.startswith(("visual.", "lm_head.")) for name in names)


@pytest.mark.parametrize("name", DESCRIBED)
def test_describes_itself(folder, name, capsys):
    """`inspect` reads headers only; the plan counts each stage's work; both know all encoders."""
    family, parts, line, default, height, refused = DESCRIBED[name]
    description, ours = describe(folder(name)), load(folder(name), device="cpu", nfe=1)
    assert description.family == family == ours.plan.family and family in str(ours.plan)
    names = [part.name for part in description.parts]
    assert len(names) == parts and names[0] == "text_encoder" and names[-2:] == ["transformer", "vae"]
    assert cli.main(["inspect", str(folder(name))]) == 0 and line in capsys.readouterr().out
    assert cli.main(["inspect", str(folder(name)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == family
    assert [stage.name for stage in ours.plan.stages] == ["text", "context", "velocity", "decode"]
    assert all(stage.flops > 0 and stage.weight_bytes > 0 for stage in ours.plan.stages)
    assert ours.plan.absorbed == (family != "sd3.5")
    if name == "qwen-image":
        encoder, _, vae = description.parts
        assert encoder.needed < encoder.stored
        assert vae.stored == sum(t.numel() for t in load_file(folder(name) / "vae" / WEIGHTS).values())
        assert ours.text.probe(PROMPT_TOKENS).embeds.shape == (1, PROMPT_TOKENS, ours.text.width)
    if height is not None:
        assert ours.sizes.resolve(None, None) == (default, default)
        with pytest.raises(ConfigError, match=f"height {height} must be {refused}"):
            ours("x", height=height)


def refuse(folder, error, match):
    for use in (describe, lambda f: load(f, device="cpu")):
        with pytest.raises(error, match=match):
            use(folder)


def change(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "file", "changes", "error", "match"),
    [
        ("qwen-image", "vae/config.json", {"_class_name": "AutoencoderKL"}, ConfigError, "an AutoencoderKLQwenImage"),
        ("qwen-image", "transformer/config.json", {"zero_cond_t": True}, ConfigError, "editing"),
        ("qwen-image", "transformer/config.json", {"joint_attention_dim": 24}, CheckpointError,
         "hidden_size 20 does not fit"),
        ("qwen-image", "vae/config.json", {"z_dim": 8, "latents_mean": [0] * 8, "latents_std": [1] * 8},
         CheckpointError, "z_dim 8"),
        ("qwen-image", "transformer/config.json", {"_class_name": "QwenImageTransformer3D"}, CheckpointError,
         "none of the"),
        ("qwen-image", "model_index.json", {"_class_name": "QwenImageEditPlusPipeline"}, CheckpointError,
         "QwenImageEditPlusPipeline, which takes images"),
        ("sd3", "text_encoder_3/config.json", {"d_model": 16}, CheckpointError, "text_encoder_3 d_model 16 does not"),
        ("sd3", "text_encoder/config.json", {"projection_dim": 8}, CheckpointError,
         "14 does not fit .* pooled_projection_dim 10"),
        ("sd3", "text_encoder/config.json", {"hidden_size": 16}, CheckpointError,
         "the 26 features of text_encoder and text_encoder_2 exceed"),
        ("sd3", "vae/config.json", {"latent_channels": 16}, CheckpointError, "vae latent_channels 16 does not fit"),
        ("sd3", "text_encoder_2/config.json", {"vocab_size": 100}, CheckpointError,
         "tokenizer_2 knows 516 tokens, .* embeds 100"),
        ("sana", "text_encoder/config.json", {"hidden_size": 16}, CheckpointError,
         "width of prompt embeddings 16 does not fit"),
        ("sana", "vae/config.json", {"latent_channels": 8}, CheckpointError, "vae latent_channels 8 does not fit"),
        ("sana", "text_encoder/config.json", {"vocab_size": 100}, CheckpointError,
         "tokenizer knows 600 tokens, .* embeds 100"),
    ],
)  # fmt: skip
def test_other_models_and_their_parts_are_refused_by_name(folder, tmp_path, name, file, changes, error, match):
    copied = shutil.copytree(folder(name), tmp_path / "m")
    change(copied, file, **changes)
    refuse(copied, error, match)


def test_an_absent_vae_is_refused(folder, tmp_path):
    copied = shutil.copytree(folder("qwen-image"), tmp_path / "m")
    shutil.rmtree(copied / "vae")
    refuse(copied, CheckpointError, "no vae/ folder")


def test_full_size_against_published_counts():
    """20.43 B parameters of which 6.80 B are modulation; text 7.07 B; VAE decoder of 0.13 B: on the meta device."""
    family = family_of({"_class_name": "QwenImageTransformer2DModel"})
    config = family.config()
    with torch.device("meta"):
        whole = family.network(config)
        inside = family.network(config, folded_steps=1, absorbed=True)
    count = {name: sum(p.numel() for p in n.parameters()) for name, n in (("whole", whole), ("inside", inside))}
    second = sum(p.numel() for p in whole.time_text_embed_2.parameters())
    assert round((count["whole"] - second) / 1e9, 2) == 20.43
    names = {part for name in whole.state_dict() for part in sources(name, family.layout.fused)}
    assert len(names) == 1933 + 4  # of the released index, and the second embedder
    modulation = sum(p.numel() for n, p in whole.named_parameters() if "_mod." in n)
    assert round(modulation / 1e9, 2) == 6.80
    assert round(count["inside"] / 1e9, 2) == 13.52
    assert sum(b.numel() for b in inside.buffers()) == 0
