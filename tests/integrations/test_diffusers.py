"""Accelerated diffusers pipelines against the same pipelines as they were."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import twinflow_rt
from tests.factory import TEXT_DIM, WEIGHTS, make_model
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.loading import load
from twinflow_rt.sampling.noise import initial_noise
from twinflow_rt.sampling.schedule import SamplerConfig

PROMPTS = ["a red circle", "a blue square above a much longer sentence"]
FAMILIES = {  # name -> the pipeline's class, arguments that switch guidance on and off
    "z-image": ("ZImagePipeline", {"guidance_scale": 3.0}, {"guidance_scale": 0.0}),
    "qwen-image": (
        "QwenImagePipeline",
        {"true_cfg_scale": 3.0, "negative_prompt": ["bad", "very very bad"]}, {},
    ),
    "sd3": ("StableDiffusion3Pipeline", {"guidance_scale": 3.0}, {"guidance_scale": 0.0}),
    "sana": ("SanaPipeline", {"guidance_scale": 3.0}, {"guidance_scale": 1.0}),
}  # fmt: skip
QUICK = {"qwen-image": 1, "sana": 1}  # steps compared by default, else 3
SIZES = {"sana": (64, 96), "qwen-image": (16, 32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(family: str):
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp("accelerate") / family, family)
        return made[family]

    return of


@pytest.fixture
def loaded(folder):
    """A family's pipeline, as diffusers loads it."""

    def of(family: str, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = getattr(diffusers, FAMILIES[family][0]).from_pretrained(folder(family), **options)
        pipe.set_progress_bar_config(disable=True)
        if family == "sana":
            pipe.default_sample_size = 64
        return pipe

    return of


def generate(pipe, family: str, *, steps: int = 3, guided: bool = False, output: str = "latent", **options):
    height, width = SIZES.get(family, (16, 24))
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    arguments = {
        "prompt": list(PROMPTS), "height": height, "width": width, "num_inference_steps": steps,
        "generator": generators, "output_type": output, **FAMILIES[family][1 if guided else 2], **options,
    }  # fmt: skip
    if family == "sana":
        arguments.setdefault("use_resolution_binning", False)
    return pipe(**arguments).images


def relative(a, b) -> float:
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return ((a - b).abs().max() / b.abs().max()).item()


@contextmanager
def accelerated(pipe, **options):
    with twinflow_rt.accelerate(pipe, **options) as handle:
        yield handle


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_the_pipeline_computed(loaded, family):
    pipe = loaded(family)
    short = {"complex_human_instruction": None} if family == "sana" else {}  # else every prompt is a page long
    before = {guided: generate(pipe, family, guided=guided, **short) for guided in (False, True)}
    pixels = generate(pipe, family, steps=2, output="np", **short)
    with accelerated(pipe, twinflow=False) as handle:
        for guided, latents in before.items():
            assert relative(generate(pipe, family, guided=guided, **short), latents) < 2e-5
        assert len(handle.plan.schedule) == 3
        assert np.abs(generate(pipe, family, steps=2, output="np", **short) - pixels).max() < 1e-4
        assert len(handle.plan.schedule) == 2
    assert torch.equal(generate(pipe, family, **short), before[False])


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        pytest.param(family, steps, marks=() if steps == QUICK.get(family, 3) else pytest.mark.full)
        for family in FAMILIES
        for steps in (1, 3)
    ],
)
def test_twinflow_steps_are_ours(loaded, folder, family, steps):
    """With the second embedder the pipeline walks the any-step sampler, whose grid is uniform here."""
    pipe = loaded(family)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    ours = load(folder(family), device="cpu", sampler=SamplerConfig(steps, mode="any"))
    height, width = SIZES.get(family, (16, 24))
    shape = (ours.vae.channels, height // ours.vae.scale, width // ours.vae.scale)
    noise = initial_noise([4, 5], shape)
    given = pipe._pack_latents(noise, 2, *shape) if family == "qwen-image" else noise
    sigmas = {"sigmas": [1 - k / steps for k in range(steps)]} if family in ("sana", "sd3") else {}
    with accelerated(pipe, twinflow=folder(family)):
        latents = generate(pipe, family, steps=steps, latents=given.clone(), **sigmas)
    want = ours(PROMPTS, height=height, width=width, seed=[4, 5], output="latent").images
    if family == "qwen-image":
        want = pipe._pack_latents(want, 2, *shape)
    assert relative(latents, want) < 2e-5


def test_one_step_of_z_image_needs_no_second_embedder(loaded, folder):
    pipe = loaded("z-image")
    with accelerated(pipe, twinflow=False):
        without = generate(pipe, "z-image", steps=1)
    with accelerated(pipe, twinflow=folder("z-image")):
        assert relative(generate(pipe, "z-image", steps=1), without) < 1e-6


def test_bfloat16(loaded):
    pipe = loaded("z-image", torch_dtype=torch.bfloat16)
    exact = generate(loaded("z-image"), "z-image")
    own = relative(generate(pipe, "z-image"), exact)
    with accelerated(pipe, twinflow=False):
        assert relative(generate(pipe, "z-image"), exact) < max(1.1 * own, 0.02)
        assert pipe.transformer.dtype == torch.bfloat16


NETWORK, TEXT, VAE = range(3)
SHORT = {"32": torch.float32, "16": torch.float16, "b16": torch.bfloat16}
MIXTURES = [  # of network, text encoders and VAE; the first is how diffusers loads most releases' files
    ("z-image", "32 16 32"), ("z-image", "b16 16 32"), ("z-image", "16 b16 b16"), ("qwen-image", "32 16 32"),
    ("sd3", "32 16 32"), ("sd3", "16 16 32"), ("sana", "32 16 32"),
]  # fmt: skip
EVERY = [(family, " ".join(kinds)) for family in FAMILIES for kinds in product(SHORT, repeat=3)]


@pytest.mark.parametrize(
    ("family", "kinds"),
    [*MIXTURES, *(pytest.param(*one, marks=pytest.mark.full) for one in EVERY if one not in MIXTURES)],
)
def test_parts_of_different_dtypes(loaded, family, kinds):
    """The network gets what it computes in, whatever the others do: as close to float32 as diffusers' own mixture
    where that runs at all, else as the coarsest part allows."""
    pipe, kinds = loaded(family), [SHORT[kind] for kind in kinds.split()]
    options = {"steps": 1, "output": "np"} | ({"complex_human_instruction": None} if family == "sana" else {})
    exact = generate(pipe, family, **options)
    pipe.transformer.to(kinds[NETWORK]), pipe.vae.to(kinds[VAE])
    for name, part in pipe.components.items():
        if name.startswith("text_encoder"):
            part.to(kinds[TEXT])
    try:
        own = np.abs(generate(pipe, family, **options) - exact).mean()
    except RuntimeError:  # diffusers hands one part's dtype to the next
        own = 0
    with accelerated(pipe, twinflow=False):
        error = np.abs(generate(pipe, family, **options) - exact).mean()
    assert error < max(3 * own, 0.02 if torch.bfloat16 in kinds else 0.003)


def test_dynamic_shifting_folds_for_each_size(loaded):
    pipe = loaded("qwen-image")
    want = [generate(pipe, "qwen-image", width=width) for width in (16, 64)]
    with accelerated(pipe, twinflow=False) as handle:
        schedules = []
        for width, latents in zip((16, 64), want, strict=True):
            assert relative(generate(pipe, "qwen-image", width=width), latents) < 2e-5
            schedules.append(handle.plan.schedule)
    assert schedules[0] != schedules[1]


def test_callbacks_and_interruption(loaded):
    pipe, seen = loaded("z-image"), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        pipe._interrupt = step == 1
        return {"latents": tensors["latents"] * 0.5}

    plain = generate(pipe, "z-image", callback_on_step_end=callback)
    expected, seen = seen, []
    with accelerated(pipe, twinflow=False):
        assert relative(generate(pipe, "z-image", callback_on_step_end=callback), plain) < 2e-5
    assert seen == expected and len(seen) == 2


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_slicing_and_tiling_stay(loaded, family):
    pipe = loaded(family)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    if family == "z-image":
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 16
    else:
        pipe.vae.tile_sample_min_height = pipe.vae.tile_sample_min_width = 32
        pipe.vae.tile_sample_stride_height = pipe.vae.tile_sample_stride_width = 16
    options = {"height": 48, "width": 64, "steps": 1, "output": "np"}
    want = generate(pipe, family, **options)
    with accelerated(pipe, twinflow=False):
        assert np.abs(generate(pipe, family, **options) - want).max() < 1e-4


def test_restores_what_was_there(loaded):
    pipe = loaded("z-image")
    parts, config = (pipe.transformer, pipe.vae.decoder), dict(pipe.config)
    handle = twinflow_rt.accelerate(pipe, twinflow=False)
    assert pipe.transformer is not parts[0] and pipe.vae.decoder is not parts[1]
    assert pipe.transformer.config is parts[0].config
    with pytest.raises(ConfigError, match="accelerated already"):
        twinflow_rt.accelerate(pipe, twinflow=False)
    handle.restore()
    assert (pipe.transformer, pipe.vae.decoder) == parts and dict(pipe.config) == config
    with pytest.raises(ConfigError, match="restored"):
        _ = handle.plan
    with pytest.raises(RuntimeError, match="on purpose"), accelerated(pipe, twinflow=False):
        raise RuntimeError("on purpose")
    assert pipe.transformer is parts[0]


def test_a_loaded_twinflow_checkpoint_asks_which_model_is_meant(loaded, folder):
    for family, name in (("z-image", "t_embedder_2"), ("qwen-image", "time_text_embed_2")):
        pipe = loaded(family)
        with pytest.raises(ConfigError, match="what diffusers left of the TwinFlow checkpoint") as caught:
            twinflow_rt.accelerate(pipe)
        assert str(folder(family)) in str(caught.value) and name not in pipe.transformer.state_dict()


def test_a_plain_pipeline_needs_no_choice(tmp_path):
    pipe = diffusers.ZImagePipeline.from_pretrained(make_model(tmp_path / "m", second="absent"))
    pipe.set_progress_bar_config(disable=True)
    want = generate(pipe, "z-image")
    with accelerated(pipe):
        assert relative(generate(pipe, "z-image"), want) < 2e-5
    with pytest.raises(CheckpointError, match="no TwinFlow checkpoint"):
        twinflow_rt.accelerate(pipe, twinflow=tmp_path / "m")


def test_another_models_second_embedder(loaded, folder, tmp_path):
    other = make_model(tmp_path / "other")
    file = other / "transformer" / WEIGHTS
    tensors = load_file(file)
    save_file({k: v + 1 if k.startswith("t_embedder.") else v for k, v in tensors.items()}, file)
    pipe = loaded("z-image")
    with pytest.raises(CheckpointError, match="another model"):
        twinflow_rt.accelerate(pipe, twinflow=other)
    assert type(pipe.transformer).__name__ == "ZImageTransformer2DModel"


def test_twinflow_refuses_schedulers_that_step_otherwise(loaded, folder):
    pipe = loaded("z-image")
    with accelerated(pipe, twinflow=folder("z-image")):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        with pytest.raises(ConfigError, match="without noise"):
            generate(pipe, "z-image")
        pipe.scheduler = type("Other", (diffusers.FlowMatchEulerDiscreteScheduler,), {})()
        with pytest.raises(ConfigError, match="as FlowMatchEulerDiscreteScheduler"):
            generate(pipe, "z-image")


def test_unusable_calls_are_refused(loaded):
    pipe = loaded("z-image")
    with accelerated(pipe, twinflow=False):
        pipe.scheduler.set_timesteps(2, mu=1.0)
        image, prompt = torch.zeros(4, 1, 4, 4), torch.zeros(3, TEXT_DIM)
        with pytest.raises(ConfigError, match="none of"):
            pipe.transformer([image], torch.tensor([0.123]), [prompt])
        now = (1000 - pipe.scheduler.timesteps[:1]) / 1000
        assert pipe.transformer([image], now, [prompt]).sample[0].shape == image.shape
        with pytest.raises(ConfigError, match="siglip_feats"):
            pipe.transformer([image], now, [prompt], siglip_feats=[prompt])
        with pytest.raises(ConfigError, match="one size"):
            pipe.transformer([image, image[..., :2]], now.expand(2), [prompt, prompt])
        with pytest.raises(ConfigError, match="joint_attention_kwargs"):
            generate(pipe, "z-image", joint_attention_kwargs={"scale": 2.0})
        with pytest.raises(ConfigError, match="moved or cast"):
            pipe.to(torch.bfloat16)
        pipe.to("cpu")
        with pytest.raises(ConfigError, match="restore"):
            pipe.transformer.save_pretrained("nowhere")


def test_video_is_not_decoded(loaded):
    pipe = loaded("qwen-image")
    with accelerated(pipe, twinflow=False), pytest.raises(ConfigError, match="one frame"):
        pipe.vae.decode(torch.zeros(1, 4, 2, 4, 4))


def test_unusable_pipelines_are_refused(loaded):
    class Other:
        transformer = torch.nn.Linear(1, 1)

    with pytest.raises(ConfigError, match="Linear as its transformer; supported are ZImage"):
        twinflow_rt.accelerate(Other())
    pipe = loaded("z-image")
    pipe.transformer.layers[0].attention.to_q.lora_A = torch.nn.Linear(1, 1)  # as peft names its layers
    with pytest.raises(ConfigError, match="fuse_lora"):
        twinflow_rt.accelerate(pipe, twinflow=False)
    pipe = loaded("z-image")
    pipe.vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ConfigError, match="AutoencoderKL is offloaded"):
        twinflow_rt.accelerate(pipe, twinflow=False)
