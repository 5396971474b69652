"""Memory that runs out: a named error or fewer images at once, nothing kept, and a pipeline that goes on."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import twinflow_rt
from twinflow_rt import cli
from twinflow_rt.errors import ConfigError, DeviceError, OutOfMemoryError
from twinflow_rt.loading import load
from twinflow_rt.runtime import out_of_memory

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
FAILURES = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
    "cpu": RuntimeError(ALLOCATOR + " to allocate 25165824 bytes."),
    "onednn": RuntimeError("could not create a primitive"), "python": MemoryError(),
}  # fmt: skip
ARGS = {"height": 32, "width": 32, "seed": 1, "output": "np"}

LIMITED = """
import json, resource, sys, weakref
import torch, twinflow_rt
from twinflow_rt.host_memory import status_bytes

torch.set_num_threads(1)
pipe = twinflow_rt.load("demo", device="cpu")
args = {"num_images": 4, "height": 256, "width": 256, "seed": 0, "output": "np"}
# each shape once: at the very end of its memory, oneDNN may crash while it generates code for a new one
small, _, want = (pipe("a red circle", **{**args, "num_images": n}).images for n in (1, 2, 4))
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
out = {}
for _ in range(2):
    resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + 40 * 2**20, hard))
    before = status_bytes("VmRSS")
    try:
        pipe("a red circle", **args)
    except twinflow_rt.OutOfMemoryError as error:
        out["message"] = str(error)
        out["kept"] = status_bytes("VmRSS") - before  # while the error is alive
split = pipe("a red circle", on_oom="split", **args)
out["at_once"], out["split"] = split.at_once, int(abs(split.images.astype(int) - want).max())
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
out["usable"] = bool((pipe("a red circle", **{**args, "num_images": 1}).images == small).all())
out["whole"] = bool((pipe("a red circle", **args).images == want).all())
print(json.dumps(out))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS, /proc")
def test_real_limit_on_a_cpu():
    """A process with 40 MB of address space left asks for a batch that needs three times as much."""
    # what malloc would keep of freed memory is room, how much depends on luck: so it is told to keep none
    env = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert "images of 256x256, 4 at once, do not fit in cpu's memory" in out["message"]
    assert "can't allocate memory" in out["message"] and "on_oom='split'" in out["message"]
    assert out["kept"] < 8e6, out
    assert out["at_once"] in (1, 2) and out["split"] <= 1, out
    assert out["usable"] and out["whole"], out


@pytest.fixture
def pipe():
    return load("demo", device="cpu", dtype="float32", capture="off")  # whose networks are called each time


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("moment", ["recording", "playing"])
def test_cpu_graphs_keep_nothing_of_a_call_that_fails(monkeypatch, failure, moment):
    pipe, lost, failing = load("demo", device="cpu", dtype="float32"), [], []
    monkeypatch.setattr(pipe.captures, "longest", 10)  # on a busy machine, too
    run, want = pipe.vae.ops.group_norm_silu, None

    def group_norm_silu(x, *args):
        if failing:
            lost.append(weakref.ref(x))
            raise type(FAILURES[failure])(*FAILURES[failure].args)
        return run(x, *args)

    if moment == "recording":
        monkeypatch.setattr(pipe.vae.network, "ops", replace(pipe.vae.ops, group_norm_silu=group_norm_silu))
    for _ in range(1 if moment == "recording" else 3):
        want = pipe("a", **ARGS).images
    if moment == "playing":
        (entry,) = (e for key, e in pipe.captures._kept.items() if key[0] == "decode")
        step = next(i for i, (func, *_) in enumerate(entry.graph.steps) if func.__name__ == "group_norm_silu")
        entry.graph.steps[step] = (group_norm_silu, *entry.graph.steps[step][1:])
        del entry
    failing.append(1)
    with pytest.raises(OutOfMemoryError):
        pipe("a", **ARGS)
    assert lost and all(ref() is None for ref in lost)
    failing.clear()
    assert np.array_equal(pipe("a", **ARGS).images, want)


def fail_above(monkeypatch, pipe, images: int, failure: str, stage: str = "network"):
    """Makes a stage run out of memory with more than that many images. Returns the sizes it was called with, and
    weak references to the tensors of failed calls."""
    network = {"network": pipe.program.network, "decode": pipe.vae.network, "text": pipe.text.network}[stage]
    run, called, lost = network.forward, [], []

    def forward(x, *args, **kwargs):
        called.append(len(x))
        activations = torch.zeros(1000)
        if len(x) > images:
            lost.append(weakref.ref(activations))
            raise type(FAILURES[failure])(*FAILURES[failure].args)
        return run(x, *args, **kwargs)

    monkeypatch.setattr(network, "forward", forward)
    return called, lost


@pytest.mark.parametrize("failure", FAILURES)
def test_raise(pipe, monkeypatch, failure):
    """A named error with the remedy, that holds on to nothing; the next call works."""
    want = pipe("a", **ARGS).images
    _, lost = fail_above(monkeypatch, pipe, 1, failure)
    gc.disable()
    try:
        with pytest.raises(OutOfMemoryError, match=r"32x32, 3 at once, do not fit in cpu's .* on_oom='split'") as e:
            pipe("a", num_images=3, **ARGS)
        assert isinstance(e.value, DeviceError) and e.value.__context__ is None and e.value.__cause__ is None
        assert [ref() for ref in lost] == [None]  # without the garbage collector's help
    finally:
        gc.enable()
    assert np.array_equal(pipe("a", **ARGS).images, want)


@pytest.mark.parametrize("stage", ["network", "decode"])
@pytest.mark.parametrize("failure", FAILURES)
def test_split(pipe, monkeypatch, failure, stage):
    want = pipe("a", num_images=7, **ARGS).images
    called, lost = fail_above(monkeypatch, pipe, 2, failure, stage)
    result = pipe("a", num_images=7, on_oom="split", **ARGS)
    assert called == [7, 4, 2, 2, 2, 1] and result.at_once == 2  # 4 fails at its first part
    assert np.abs(result.images.astype(int) - want).max() <= 1 and result.seeds == list(range(1, 8))
    assert all(ref() is None for ref in lost)


def test_split_of_prompts(pipe, monkeypatch):
    """The text encoder, too, sees fewer prompts; every image still has its own."""
    prompts = ["a red circle", "a blue square, twice", "a green triangle"]
    alone = [pipe(p, **{**ARGS, "seed": 1 + i}).images[0] for i, p in enumerate(prompts)]
    called, _ = fail_above(monkeypatch, pipe, 1, "cuda", "text")
    images = pipe(prompts, on_oom="split", **ARGS).images
    assert called == [3, 2, 1, 1, 1]
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(images, alone, strict=True)) <= 1


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_split_on_the_command_line(pipe, monkeypatch, tmp_path, capsys, command):
    monkeypatch.setattr("twinflow_rt.loading.load_opened", lambda *args, **options: pipe)
    called, _ = fail_above(monkeypatch, pipe, 1, "cuda")
    (tmp_path / "p.txt").write_text("a")
    words = {
        "generate": ["a", "--seed", "1", "-o", str(tmp_path / "out.png"), "--json"],
        "batch": ["demo", str(tmp_path / "p.txt"), "-o", str(tmp_path / "out")],
    }[command]
    argv = [command, *words, "--num-images", "3", "--size", "32"]
    assert cli.main(argv) == 2 and "--on-oom split" in capsys.readouterr().err
    assert cli.main([*argv, "--resume"] if command == "batch" else argv) == 2
    capsys.readouterr()
    called.clear()
    assert cli.main([*argv, "--on-oom", "split", *(["--resume"] if command == "batch" else [])]) == 0
    assert called == [3, 2, 1, 1, 1]
    if command == "generate":
        assert json.loads(capsys.readouterr().out)["at_once"] == 1


def test_one_image_that_does_not_fit(pipe, monkeypatch):
    fail_above(monkeypatch, pipe, 0, "cuda")
    with pytest.raises(OutOfMemoryError, match=r"32x32, 1 at once, .*CUDA out of memory"):
        pipe("a", on_oom="split", **ARGS)


def test_other_failures_are_not_memory(pipe, monkeypatch):
    monkeypatch.setitem(FAILURES, "other", RuntimeError("could not create a primitive descriptor for the matmul"))
    called, _ = fail_above(monkeypatch, pipe, 1, "other")
    with pytest.raises(RuntimeError, match="primitive descriptor"):
        pipe("a", num_images=2, on_oom="split", **ARGS)
    assert called == [2]
    with pytest.raises(ConfigError, match="on_oom must be one of raise, split"):
        pipe("a", on_oom="next", **ARGS)


def test_a_thread_that_onednn_refuses_is_left(pipe, monkeypatch):
    """Once its code generator fails on a thread, oneDNN makes no new kernel there; other threads are sound."""
    state, refusals = threading.local(), []

    def forward(x, *args, run=pipe.program.network.forward):
        if len(x) > 1 or hasattr(state, "error"):
            state.error = True
            refusals.append(len(x))
            raise RuntimeError("could not create a primitive")
        return run(x, *args)

    monkeypatch.setattr(pipe.program.network, "forward", forward)
    answers: list[int | str | None] = []

    def work():
        for options in ({"num_images": 2}, {}, {"num_images": 2, "on_oom": "split"}):
            try:
                answers.append(pipe("a", **options, **ARGS).at_once)
            except OutOfMemoryError:
                answers.append(None)
        try:
            pipe("a", callback=lambda *args: 1 / 0, **ARGS)
        except ZeroDivisionError:
            answers.append("passed on")

    thread = threading.Thread(target=work)  # one that may be spoilt
    thread.start()
    thread.join()
    assert answers == [None, 1, 1, "passed on"] and refusals == [2, 2]


@pytest.mark.parametrize("when", ["tables", "assign"])
def test_memory_that_ends_during_a_refold(pipe, monkeypatch, when):
    """Half the constants of another schedule are never mixed with half of the old."""
    from twinflow_rt import compile as compiling

    want = {nfe: pipe("a", nfe=nfe, **ARGS).images for nfe in (1, 2, 3)}
    pipe("a", nfe=1, **ARGS)
    monkeypatch.setattr(pipe.program._folded, "_kept", type(pipe.program._folded._kept)())  # no tables to go back to
    done = []

    def fail_later(run):
        def call(*args, **kwargs):
            done.append(1)
            if len(done) == 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return run(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if when == "assign":
            patch.setattr(compiling, "assign", fail_later(compiling.assign))
        else:
            patch.setattr(pipe.program.recipe.source, "get", fail_later(pipe.program.recipe.source.get))
        with pytest.raises(OutOfMemoryError):
            pipe("a", nfe=2, **ARGS)
    assert len(done) == 3
    assert all(np.array_equal(pipe("a", nfe=nfe, **ARGS).images, want[nfe]) for nfe in (1, 3, 2, 1))


@pytest.mark.parametrize("part", ["text encoder", "transformer", "vae"])
def test_loading(part):
    """What was loaded already is not kept by the error."""
    seen = []

    def progress(name, size):
        if name == part:
            seen.append(1)
            if len(seen) == 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    with pytest.raises(OutOfMemoryError, match=r"loading needs more memory than is free \(CUDA out of memory") as e:
        load("demo", device="cpu", progress=progress)
    assert e.value.__context__ is None


def test_server_answers_go_on(pipe, monkeypatch):
    """A batch that does not fit runs image by image."""
    from twinflow_rt.serve.engine import Engine, Limits

    fail_above(monkeypatch, pipe, 1, "cuda")
    engine = Engine(pipe, Limits(max_wait=0.2))
    try:
        jobs = [engine.submit("a", width=32, height=32, seed=i)[0] for i in range(3)]
        assert [job.future.result(60).size for job in jobs] == [(32, 32)] * 3
    finally:
        assert engine.drain(60)


def test_names():
    assert twinflow_rt.OutOfMemoryError is OutOfMemoryError
    assert not out_of_memory.is_out_of_memory(ValueError("DefaultCPUAllocator"))
    assert out_of_memory.named("x")(lambda: 3)() == 3
