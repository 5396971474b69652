"""What a pipeline promises, whichever family it is of."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from tests.factory import make_model
from twinflow_rt.config import SizeRule, has_native, resolve_device, resolve_dtype
from twinflow_rt.errors import CancelledError, ConfigError, DeviceError, PromptTruncatedWarning
from twinflow_rt.loading import load

PROMPTS = ["a red square", "a big blue circle above a small green triangle, twice", ""]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("pipe") / "m")


@pytest.fixture(scope="module")
def pipe(model):
    return load(model, device="cpu")


def test_images_are_prompt_major_and_seeded_one_by_one(pipe):
    """Image k of the batch has seed + k and is the image that seed gives alone."""
    args = {"height": 16, "width": 24, "output": "latent"}
    result = pipe(PROMPTS[:2], num_images=2, seed=10, **args)
    assert result.seeds == [10, 11, 12, 13]
    for k, prompt in enumerate([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2):
        alone = pipe(prompt, seed=10 + k, **args).images[0]
        assert (result.images[k] - alone).abs().max() < 1e-5
    assert not torch.equal(result.images[0], result.images[1])
    given = pipe(PROMPTS[:2], seed=[13, 10], **args)
    assert given.seeds == [13, 10]
    assert pipe("x", **args).seeds != pipe("x", **args).seeds


def test_equal_prompts_are_encoded_once(pipe):
    seen = []
    handle = pipe.text.network.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0]))
    try:
        prompts = ["b", "a", "b", "b"]
        out = pipe(prompts, height=16, width=16, seed=0, output="latent").images
    finally:
        handle.remove()
    assert seen == [2]
    assert (out[1] - pipe("a", height=16, width=16, seed=1, output="latent").images[0]).abs().max() < 1e-5


def test_embeddings_can_stand_for_the_prompt(pipe):
    with torch.inference_mode():
        embeds = pipe.text(PROMPTS[:2])
    args = {"height": 16, "width": 16, "seed": 1, "output": "latent", "num_images": 2}
    assert torch.equal(pipe(embeds, **args).images, pipe(PROMPTS[:2], **args).images)


def test_stages_are_timed_and_their_memory_recorded(pipe):
    result = pipe("x", height=16, width=16, seed=1)
    assert list(result.timings) == ["text", "noise", "sample", "decode", "output", "total"]
    assert list(result.memory) == ["text", "noise", "sample", "decode", "output"]
    parts = [v for k, v in result.timings.items() if k != "total"]
    assert min(parts) >= 0 and 0 < sum(parts) <= result.timings["total"]
    assert all(1e7 < v < 1e12 for v in result.memory.values())


@pytest.mark.parametrize("stop_at", range(5))
def test_cancelled_before_any_stage(pipe, stop_at):
    asked = []
    done = []

    def cancel():
        asked.append(1)
        return len(asked) > stop_at

    with pytest.raises(CancelledError, match="cancelled"):
        pipe("x", height=16, width=16, cancel=cancel, callback=lambda *args: done.append(args))
    assert len(asked) == stop_at + 1
    assert len(done) == (stop_at > 3)  # text, noise, sample, its evaluation, decode
    assert pipe("x", height=16, width=16, seed=0).images


def test_callback_sees_every_evaluation(pipe):
    seen = []
    result = pipe(
        "x", height=16, width=16, seed=0, nfe=3, output="latent",
        callback=lambda done, total, x0: seen.append((done, total, x0)),
    )  # fmt: skip
    assert [(d, n) for d, n, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(seen[-1][2], result.images)


def test_threads_with_different_schedules_do_not_mix(pipe):
    wanted = {n: pipe("x", height=16, width=16, seed=n, nfe=n, output="np").images for n in (1, 2, 4)}
    failures = []

    def work(n):
        for _ in range(4):
            got = pipe("x", height=16, width=16, seed=n, nfe=n, output="np").images
            if not np.array_equal(got, wanted[n]):
                failures.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in wanted]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": []}, "empty list"),
        ({"prompt": None}, "must be a string"),
        ({"prompt": ["a", 3]}, "must be a string"),
        ({"prompt": b"a"}, "must be a string"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"height": 65}, "height 65 .* the nearest is 64"),
        ({"height": 67}, "multiple of 8 from 8 to 256; the nearest is 64"),
        ({"width": 4}, "the nearest is 8"),
        ({"width": 100_000}, "the nearest is 256"),
        ({"height": -8}, "the nearest is 8"),
        ({"height": 64.0}, "integer number of pixels"),
        ({"height": True}, "integer number of pixels"),
        ({"num_images": 0}, "num_images must be a positive integer"),
        ({"num_images": 1.5}, "num_images"),
        ({"nfe": 0}, "nfe"),
        ({"nfe": 101}, "nfe"),
        ({"nfe": "2"}, "nfe"),
        ({"nfe": 2, "sampler": "2"}, "not both"),
        ({"sampler": "fast"}, "no preset; use one of 1, 2, 4, any, multi"),
        ({"sampler": 3}, "SamplerConfig"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"output": "jpg"}, "output must be one of pil, np, pt, latent"),
    ],
)
def test_impossible_arguments(pipe, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        pipe(**{"prompt": "x", **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"dtype": "int8"}, ConfigError, "dtype 'int8'"),
        ({"dtype": torch.float64}, ConfigError, "float32, float16, bfloat16"),
        ({"device": "gpu"}, ConfigError, "is not a device"),
        ({"device": "meta"}, ConfigError, "not supported"),
        ({"device": "cuda:99"}, DeviceError, "absent"),
        ({"nfe": 0}, ConfigError, "nfe"),
        ({"sampler": "x"}, ConfigError, "preset"),
    ],
)
def test_impossible_loads(model, kwargs, error, message):
    with pytest.raises(error, match=message):
        load(model, **{"device": "cpu", **kwargs})


def test_default_size_is_the_vaes_training_size(pipe):
    assert pipe.sizes == SizeRule(multiple=8, max_height=256, max_width=256, default=64)
    assert pipe("x", seed=0, output="np").images.shape == (1, 64, 64, 3)
    assert pipe("x", seed=0, width=24, output="np").images.shape == (1, 64, 24, 3)


def test_longest_prompt_leaves_room_in_the_position_table(pipe):
    assert pipe.text.max_tokens == 544
    with pytest.warns(PromptTruncatedWarning, match="reads 544 of"):
        images = pipe(["long " * 400, "short"], height=256, width=256, seed=0, output="pt").images
    assert images.isfinite().all()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_checkpoints_compute_natively_or_in_float32(tmp_path, stored):
    pipe = load(make_model(tmp_path / "half", dtype=stored), device="cpu")
    assert pipe.dtype == (stored if has_native(stored, CPU) else torch.float32)
    assert pipe("x", height=16, width=16, seed=0, output="latent").images.dtype == pipe.dtype


def test_dtype_names():
    for name in ("bf16", "bfloat16", torch.bfloat16, "torch.bfloat16"):
        assert resolve_dtype(name, CPU, torch.float32) == torch.bfloat16
    assert resolve_dtype(None, CPU, torch.float32) == torch.float32
    assert resolve_device("cpu") == CPU


def test_bfloat16_pipeline_runs_and_is_close(model, pipe):
    half = load(model, device="cpu", dtype="bf16")
    args = {"height": 16, "width": 24, "seed": 0, "output": "latent"}
    exact, ours = pipe(PROMPTS, **args).images, half(PROMPTS, **args).images
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_generating_imports_neither_diffusers_nor_transformers(model, tmp_path):
    code = (
        "import sys, twinflow_rt\n"
        "assert 'torch' not in sys.modules\n"
        f"twinflow_rt.load({str(model)!r}, device='cpu')('x', height=16, width=16, seed=0)\n"
        "heavy = {'diffusers', 'transformers', 'triton', 'torch._dynamo', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
