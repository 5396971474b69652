"""Qwen-Image from folder to pixels against diffusers' QwenImagePipeline on the same files."""

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
from tests.qwen_image_factory import add_second, make_model
from twinflow_rt import cli
from twinflow_rt.checkpoint.fuse import sources
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.families import family_of
from twinflow_rt.loading import load
from twinflow_rt.planning.description import describe
from twinflow_rt.planning.work import PROMPT_TOKENS
from twinflow_rt.sampling.noise import initial_noise

PROMPTS = ["a red square", "a big blue circle above a small green triangle, twice", ""]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("qwen") / "m")


@pytest.fixture(scope="module")
def pipe(model):
    return load(model, device="cpu")


@pytest.fixture(scope="module")
def reference(model):
    """diffusers' pipeline, with TwinFlow's second embedder (which it lacks) hooked in for tt = 0."""
    from diffusers import QwenImagePipeline
    from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = QwenImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    stored = load_file(model / "transformer" / WEIGHTS)
    second = QwenTimestepProjEmbeddings(pipe.transformer.inner_dim)
    prefix = "time_text_embed_2."
    second.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
    pipe.transformer.time_text_embed.register_forward_hook(add_second(second, 0.0))
    return pipe


@torch.no_grad()
def theirs(pipe, prompts, noise, output):
    """One Euler step of flow matching from t = 1 to 0: z - F, TwinFlow's single evaluation."""
    b, c, h, w = noise.shape
    packed = pipe._pack_latents(noise[:, None], b, c, h, w)
    out = pipe(
        list(prompts), height=8 * h, width=8 * w, num_inference_steps=1, true_cfg_scale=1.0, latents=packed,
        output_type=output, max_sequence_length=1024,
    ).images  # fmt: skip
    return pipe._unpack_latents(out, 8 * h, 8 * w, 8)[:, :, 0] if output == "latent" else out


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@pytest.mark.parametrize("size", [(32, 32), (16, 80), (48, 32)])
def test_equals_diffusers_pipeline(pipe, reference, prompts, size):
    height, width = size
    args = {"height": height, "width": width, "seed": 7}
    noise = initial_noise(range(7, 7 + len(prompts)), (4, height // 8, width // 8))
    latents = theirs(reference, prompts, noise, "latent")
    assert relative(pipe(prompts, output="latent", **args).images, latents) < 1e-5

    images = theirs(reference, prompts, noise, "np")
    assert images.std() > 0.05
    assert np.abs(pipe(prompts, output="pt", **args).images.permute(0, 2, 3, 1).numpy() - images).max() < 1e-5
    pixels = pipe(prompts, output="np", **args).images
    assert pixels.dtype == np.uint8 and np.abs(pixels - (images * 255).round()).max() <= 1


def test_seeds_make_diffusers_noise(pipe, reference):
    generators = [torch.Generator().manual_seed(40 + k) for k in range(2)]
    with torch.no_grad():
        out = reference(
            PROMPTS[:2], height=32, width=48, num_inference_steps=1, true_cfg_scale=1.0, generator=generators,
            output_type="latent",
        ).images  # fmt: skip
    ours = pipe(PROMPTS[:2], height=32, width=48, seed=40, output="latent").images
    assert relative(ours, reference._unpack_latents(out, 32, 48, 8)[:, :, 0]) < 1e-5


def test_repeated_and_ragged_prompts_equal_single_runs(pipe):
    """Contexts are computed once per prompt and repeated per image, lengths and mask with them."""
    args = {"height": 16, "width": 32, "output": "latent"}
    result = pipe([PROMPTS[1], PROMPTS[0], PROMPTS[1]], num_images=2, seed=10, **args)
    for k, prompt in enumerate(p for p in (PROMPTS[1], PROMPTS[0], PROMPTS[1]) for _ in range(2)):
        assert relative(result.images[k], pipe(prompt, seed=10 + k, **args).images[0]) < 1e-5


def test_more_steps_than_one_use_tables(model):
    """And going back to one step gives the image that absorbed weights gave."""
    pipe, args = load(model, device="cpu"), {"height": 16, "width": 16, "seed": 1, "output": "latent"}
    one = pipe("x", **args).images
    four = pipe("x", nfe=4, **args).images
    assert relative(four, load(model, device="cpu", nfe=4)("x", **args).images) < 1e-5
    assert relative(four, one) > 0.1
    assert relative(pipe("x", **args).images, one) < 1e-5


def test_artifact_gives_the_same_images(pipe, tmp_path):
    args = {"height": 16, "width": 32, "seed": 3, "output": "np"}
    saved = pipe.save(tmp_path / "artifact")
    again = load(saved, device="cpu")
    assert np.array_equal(again("a red circle", **args).images, pipe("a red circle", **args).images)
    names = load_file(saved / "text_encoder" / "model.safetensors")
    assert not any(name.startswith(("visual.", "lm_head.")) for name in names)


def test_sizes_and_plan(pipe):
    assert pipe.sizes.resolve(None, None) == (1328, 1328)
    with pytest.raises(ConfigError, match="height 20 must be a multiple of 16 from 16 to 4096; the nearest is 16"):
        pipe("x", height=20)
    stages = {s.name: s for s in pipe.plan.stages}
    assert list(stages) == ["text", "context", "velocity", "decode"]
    assert all(s.flops > 0 and s.weight_bytes > 0 for s in stages.values())
    text = pipe.text
    assert text.probe(PROMPT_TOKENS).embeds.shape == (1, PROMPT_TOKENS, text.width)


def test_inspect_needs_no_flag(model, capsys):
    description = describe(model)
    assert description.family == "qwen-image"
    assert [p.name for p in description.parts] == ["text_encoder", "transformer", "vae"]
    stored = {p.name: p for p in description.parts}
    assert stored["text_encoder"].needed < stored["text_encoder"].stored
    vae = load_file(model / "vae" / WEIGHTS)
    assert stored["vae"].stored == sum(t.numel() for t in vae.values())
    assert cli.main(["inspect", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "qwen-image"


def edit(folder, part, **changes):
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_z_image_vae(folder):
    edit(folder, "vae", _class_name="AutoencoderKL")


def without_second(folder):
    file = folder / "transformer" / WEIGHTS
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("time_text_embed_2.")}, file)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (with_z_image_vae, ConfigError, "an AutoencoderKLQwenImage"),
        (without_second, CheckpointError, "time_text_embed_2 is missing: this is a plain Qwen-Image"),
        (lambda f: edit(f, "transformer", zero_cond_t=True), ConfigError, "editing"),
        (lambda f: edit(f, "transformer", joint_attention_dim=24), CheckpointError, "hidden_size 20 does not fit"),
        (lambda f: edit(f, "vae", z_dim=8, latents_mean=[0] * 8, latents_std=[1] * 8), CheckpointError, "z_dim 8"),
        (lambda f: edit(f, "transformer", _class_name="QwenImageTransformer3D"), CheckpointError, "none of the"),
        (lambda f: shutil.rmtree(f / "vae"), CheckpointError, "no vae/ folder"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "QwenImageEditPlusPipeline"}'), CheckpointError,
         "QwenImageEditPlusPipeline, which takes images"),
    ],
)  # fmt: skip
def test_other_models_are_refused_by_name(model, tmp_path, damage, error, message):
    folder = shutil.copytree(model, tmp_path / "m")
    damage(folder)
    for use in (describe, lambda f: load(f, device="cpu")):
        with pytest.raises(error, match=message):
            use(folder)


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
