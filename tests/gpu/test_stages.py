"""Recorded and streamed stages on a GPU: CUDA graphs, pinned buffers and the memory they need."""

from __future__ import annotations

import threading

import pytest
import torch

from tests import factory
from tests.factory import FAMILIES, make_model
from tests.memory import least
from tests.runtime.test_capture import CALLS, both
from twinflow_rt.loading import load
from twinflow_rt.runtime.capture import Captures
from twinflow_rt.runtime.cuda_graph import CudaGraphs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_pipelines_give_the_same_images(family, tmp_path):
    folder = make_model(tmp_path / "m", family)
    pipes = load(folder, device="cuda", capture="off"), load(folder, device="cuda", capture="graphs")
    for prompts in CALLS:
        made = both(pipes, prompts)
    assert both(pipes, CALLS[0], seed=9) == made  # nothing new


def test_graphs_replay_on_any_stream():
    device = torch.device("cuda")
    weight = torch.randn(512, 512, device=device)
    graphs = Captures(CudaGraphs(device), strict=True)
    f = lambda x: (x @ weight).relu() @ weight
    inputs = [torch.randn(64, 512, device=device) for _ in range(8)]
    expected, results = [f(x) for x in inputs], [None] * 8
    torch.cuda.synchronize()

    def work(k):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            for _ in range(20):
                results[k] = graphs("s", f, f, inputs[k])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    assert graphs.stats()["s"].recorded == 1 and graphs.pool_bytes > 0
    graphs.clear()
    assert graphs.nbytes == 0


def test_streamed_blocks_give_the_same_images(tmp_path):
    folder = factory.make_model(tmp_path / "m")
    plain = load(folder, device="cuda")
    pipe = load(folder, device="cuda", memory_budget=least(folder, device="cuda"))
    assert pipe.memory.streamed
    for seed in range(20):
        args = {"height": 64, "width": 64, "seed": seed, "output": "latent"}
        assert (pipe("a", **args).images - plain("a", **args).images).abs().max() < 1e-3


def test_layers_of_8_bits_stream_bit_for_bit(tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 products need compute capability 8.9")
    folder, how = factory.make_model(tmp_path / "m"), {"device": "cuda", "dtype": "bfloat16", "precision": "fp8"}
    plain = load(folder, capture="off", **how)
    pipe = load(folder, memory_budget=least(folder, **how), **how)
    assert pipe.memory.streamed and any(layers.kind == "fp8" for layers in pipe.plan.layers)
    for seed in range(10):
        args = {"height": 64, "width": 64, "seed": seed, "output": "latent"}
        assert torch.equal(pipe("a", **args).images, plain("a", **args).images)


def test_tiles_are_recorded_as_one_graph(tmp_path):
    folder = factory.make_model(tmp_path / "m")
    plain, recorded = (load(folder, device="cuda", capture=how, tile=64) for how in ("off", "graphs"))
    args = {"height": 128, "width": 128, "seed": 3, "output": "pt"}
    assert (recorded("a", **args).images - plain("a", **args).images).abs().max() < 1e-3
    stats = recorded.captures.stats()
    assert stats["decode tile"].recorded == 1 < stats["decode tile"].replayed and stats["context"].recorded == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_the_predicted_peak_is_what_the_allocator_gave(streamed, tmp_path):
    """Within 10 %, on a Z-Image of a third of the width."""
    from twinflow_rt.bench.random_weights import skeleton

    folder = skeleton("z-image", tmp_path / "m", scale=0.3, layers=12)
    options = {"device": "cuda", "dtype": "bfloat16", "capture": "off", "largest": (1024, 1024, 1)}
    budget = least(folder, **options) if streamed else "60GB"
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    pipe = load(folder, memory_budget=budget, **options)
    result = pipe("a red circle " * 300, height=1024, width=1024, seed=0)
    peak = max(result.memory.values()) - base
    assert bool(pipe.memory.streamed) is streamed
    assert abs(peak - pipe.memory.peak) <= 0.1 * pipe.memory.peak, (peak, pipe.memory)
