"""What decides an image's bits (docs/reliability.md): its seed, prompt, size, the plan, device and threads; and
with batch_invariant, which costs `benches/bench_reliability.py`'s ratio, nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.factory import FAMILIES
from twinflow_rt.loading import load

PROMPTS = ["a red circle", "two blue circles above a green square, and a big purple triangle", "a green triangle", "a"]
SEEDS = [5, 6, 7, 8]
SCRIPT = """
import hashlib, sys
import torch, twinflow_rt
torch.set_num_threads(1)
images = twinflow_rt.load("demo", device="cpu")(["a red circle", "a"], seed=3, nfe=2, output="latent").images
print(hashlib.sha256(images.numpy().tobytes()).hexdigest())
"""


def same(a, b) -> bool:
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def small(pipe) -> dict[str, int]:
    """Few pixels, not square."""
    return {"height": pipe.sizes.multiple, "width": 2 * pipe.sizes.multiple}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("nfe", [1, pytest.param(2, marks=pytest.mark.full)])
def test_equal_calls_give_equal_bits(folders, family, nfe):
    """Again in the same pipeline, with other calls between, and in another pipeline."""
    first, second = (load(folders(family), device="cpu", nfe=nfe) for _ in range(2))
    args = {"seed": 3, "num_images": 2, "output": "pt", **small(first)}
    images = first(PROMPTS[:2], **args).images
    first("something else", **{**args, "seed": 1, "width": 3 * first.sizes.multiple})
    assert same(images, first(PROMPTS[:2], **args).images)
    assert same(images, second(PROMPTS[:2], **args).images)


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_another_schedule_and_back(folders, family):
    """Equal bits for equal plans. Constants that were inside the weights are tables after another schedule
    (`Plan.absorbed` says so): then the sums are others, and from then on the same."""
    pipe = load(folders(family), device="cpu")
    args = {"seed": 3, "output": "pt", **small(pipe)}
    plans, images = [], []
    for nfe in (1, 2, 1, 2, 1):
        images.append(pipe("a", nfe=nfe, **args).images)
        plans.append((nfe, pipe.program.plan.absorbed))
    assert all(same(images[i], images[j]) for i in range(5) for j in range(i) if plans[i] == plans[j])
    assert plans[0] == (1, family == "qwen-image") and plans[2] == plans[4] == (1, False)
    assert (images[0] - images[4]).abs().max() < 1e-4


@pytest.mark.full  # test_backends compares two processes in every run
def test_equal_calls_give_equal_bits_in_another_process():
    digests = {subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True).stdout for _ in "ab"}
    assert len(digests) == 1


def in_batches(pipe, output, **args):
    """Images 0..3 alone, together, in reverse order, and beside strangers."""
    call = lambda prompts, seeds: list(pipe(prompts, seed=seeds, output=output, **args).images)
    yield [call(p, [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    yield call(PROMPTS, SEEDS)
    yield call(PROMPTS[::-1], SEEDS[::-1])[::-1]
    yield call(PROMPTS[:1] + ["x"] * 2 + PROMPTS[1:], [*SEEDS[:1], 1, 2, *SEEDS[1:]])[:1] + call(PROMPTS, SEEDS)[1:]


@pytest.mark.parametrize("output", ["pt", *(pytest.param(o, marks=pytest.mark.full) for o in ("latent", "np"))])
@pytest.mark.parametrize("options", [{}, {"precision": "int8"}, {"dtype": "bfloat16"}], ids=["fp32", "int8", "bf16"])
def test_batch_invariant_demo(options, output):
    pipe = load("demo", device="cpu", batch_invariant=True, **options)
    alone, *others = in_batches(pipe, output, nfe=1)
    assert all(same(a, b) for other in others for a, b in zip(alone, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("nfe", [1, pytest.param(2, marks=pytest.mark.full)])
def test_batch_invariant_families(folders, family, nfe):
    """Prompts of several lengths, with everything that is computed once per prompt."""
    pipe = load(folders(family), device="cpu", batch_invariant=True)
    alone, *others = in_batches(pipe, "pt", nfe=nfe, **small(pipe))
    assert all(same(a, b) for other in others for a, b in zip(alone, other, strict=True))


def test_batch_invariant_embeddings(demo):
    """Embeddings of several prompts, padded to the longest: each as if given alone."""
    with torch.inference_mode():
        embeds = demo.text(PROMPTS)
    padded = replace(embeds, embeds=torch.nn.functional.pad(embeds.embeds, (0, 0, 0, 7), value=3.0))
    demo.batch_invariant = True
    try:
        together = demo(padded, seed=SEEDS, output="latent").images
        alone = [demo(embeds.select([i]), seed=s, output="latent").images[0] for i, s in enumerate(SEEDS)]
    finally:
        demo.batch_invariant = False
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))


def test_batch_invariant_calls_compute_one_image_at_a_time(demo, monkeypatch):
    """... each prompt once, and callbacks still see the whole batch."""
    encoded, seen = [], []
    handle = demo.text.network.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    # without recordings the text network is called each time
    monkeypatch.setattr(demo.text, "options", replace(demo.text.options, captures=None))
    demo.batch_invariant = True
    try:
        result = demo(
            ["b", "a", "b"], num_images=2, seed=0, nfe=2, output="latent",
            callback=lambda done, total, x0: seen.append((done, total, tuple(x0.shape[:1]))),
        )  # fmt: skip
    finally:
        handle.remove()
        demo.batch_invariant = False
    assert result.at_once == 1 and encoded == [1, 1] and seen == [(1, 2, (6,)), (2, 2, (6,))]
    assert demo("b", num_images=6, seed=0, output="latent").at_once == 6


def test_without_it_batches_agree_to_rounding(demo):
    """The default: float32 images of a batch are those of the image alone to 1e-4 of their range."""
    alone, *others = in_batches(demo, "pt")
    for other in others:
        assert max((a - b).abs().max() for a, b in zip(alone, other, strict=True)) < 1e-4


@pytest.mark.gpu
def test_across_devices(demo):
    """float32 on a GPU against the CPU: the same seeds, images within 1e-3 of their range (TF32 off)."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    there = load("demo", device="cuda", dtype="float32")
    here, gpu = (pipe(PROMPTS, seed=SEEDS, output="pt").images.cpu() for pipe in (demo, there))
    assert (here - gpu).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_promises(dtype):
    pipe = load("demo", device="cuda", dtype=dtype, batch_invariant=True)
    alone, *others = in_batches(pipe, "pt")
    again, *_ = in_batches(pipe, "pt")
    assert all(same(a, b) for other in (again, *others) for a, b in zip(alone, other, strict=True))


def test_settings_do_not_leak(demo):
    """Global switches that change bits are as they were: nothing here sets them for a caller's other models."""
    state = lambda: json.dumps([
        torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_dtype()), torch.initial_seed(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
    ])  # fmt: skip
    before, random = state(), torch.random.get_rng_state()
    demo("a", seed=1)
    assert state() == before and same(torch.random.get_rng_state(), random)
