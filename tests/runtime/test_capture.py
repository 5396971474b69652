"""Recorded stages. A fake recorder stands for CUDA: what it recorded is run again into the same outputs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import pytest
import torch

from tests.factory import FAMILIES, make_model
from tests.memory import least
from twinflow_rt.errors import ConfigError, DeviceError
from twinflow_rt.loading import load
from twinflow_rt.models.context import BUCKET, bucket
from twinflow_rt.runtime.capture import Captures, Stats, open_captures
from twinflow_rt.runtime.cpu_graph import CpuGraphs
from twinflow_rt.runtime.tensor_tree import tensors_of
from twinflow_rt.stages import tiles

CPU = torch.device("cpu")


class FakeGraphs:
    """Keeps to the rules of CUDA graphs: outputs are buffers that every replay overwrites, the pool grows
    to what the largest graph needs (`needs(outputs)` bytes) and shrinks as a whole."""

    def __init__(self, needs=lambda outputs: sum(x.nbytes for x in tensors_of(outputs))):
        self.needs, self.pool, self.inside, self.resets = needs, 0, False, 0

    def record(self, run, inputs):
        outputs = run()
        grown = max(self.needs(outputs) - self.pool, 0)
        self.pool += grown
        return (run, outputs), outputs, grown

    def enter(self):
        assert not self.inside
        self.inside = True

    def replay(self, graph):
        assert self.inside
        run, outputs = graph
        for old, new in zip(tensors_of(outputs), tensors_of(run()), strict=True):
            old.copy_(new)

    def leave(self):
        self.inside = False

    def reset(self):
        self.pool, self.resets = 0, self.resets + 1


@dataclass(frozen=True)
class Pair:
    first: torch.Tensor
    name: str
    second: torch.Tensor | None = None


def test_a_shape_is_recorded_once_and_results_are_the_callers_own():
    graphs, calls = Captures(FakeGraphs()), []

    def f(x, pair, step):
        calls.append(tuple(x.shape))
        return x * pair.first + step, (x + 1,)

    x = torch.arange(3.0)
    kept = [graphs("s", f, f, x + k, Pair(x, "a"), 2) for k in range(3)]
    for k, (a, (b,)) in enumerate(kept):
        assert torch.equal(a, (x + k) * x + 2) and torch.equal(b, x + k + 1)
    assert graphs.stats()["s"].recorded == 1 and graphs.stats()["s"].replayed == 3
    for other in ((x, Pair(x, "b"), 2), (x, Pair(x, "a", x), 2), (x, Pair(x, "a"), 3), (x[:2], Pair(x[:1], "a"), 2)):
        a, _ = graphs("s", f, f, *other)
        assert torch.equal(a, other[0] * other[1].first + other[2])
    assert graphs.stats()["s"].recorded == graphs.stats()["s"].kept == 5


def test_strides_of_inputs_do_not_leak_into_results():
    graphs, x = Captures(FakeGraphs()), torch.arange(12.0).view(3, 4)
    f = lambda a: a * 2
    for given in (x, x.t(), x[:, ::2], x[:1].expand(5, 4)):
        for k in (0, 1):
            assert torch.equal(graphs("s", f, f, given + 0 if k else given), given * 2)


def test_another_owner_forgets_a_stages_graphs():
    graphs, weight = Captures(FakeGraphs()), [torch.tensor(2.0)]
    f = lambda x: x * weight[0]
    other = lambda x: x + 1
    assert graphs("s", weight[0], f, torch.ones(2)).sum() == 4
    graphs("t", other, other, torch.ones(2))
    weight[0] = torch.tensor(5.0)
    assert graphs("s", weight[0], f, torch.ones(2)).sum() == 10
    stats = graphs.stats()
    assert (stats["s"].recorded, stats["s"].kept, stats["t"].kept) == (2, 1, 1)


def test_the_least_recently_used_goes_first():
    graphs = Captures(FakeGraphs(), entries=2)
    f = lambda x: x + 1
    for n in (1, 2, 1, 3, 1, 2):  # 3 drives out 2, 2 then 3
        assert torch.equal(graphs("s", f, f, torch.zeros(n)), torch.ones(n))
    stats = graphs.stats()["s"]
    assert (stats.kept, stats.recorded, stats.evicted, stats.replayed) == (2, 4, 2, 6)


def test_the_pool_is_bounded():
    """Graphs share what the largest needs, each has its inputs; beyond the budget all go, one is recorded again."""
    backend = FakeGraphs(needs=lambda outputs: outputs.nbytes)
    graphs = Captures(backend, budget=100 + 4 * 60)
    f = lambda x: x + 1
    run = lambda n: graphs("s", f, f, torch.zeros(n))
    for n in (10, 5, 20):
        run(n)
    assert graphs.pool_bytes == backend.pool == 80 and graphs.nbytes == 80 + 4 * 35
    run(25)
    assert graphs.pool_bytes == backend.pool == 100 and graphs.stats()["s"].kept == 4
    assert torch.equal(run(43), torch.ones(43))  # too large for any budget: runs without
    assert backend.resets == 2 and graphs.pool_bytes == backend.pool == 0 == graphs.stats()["s"].kept
    assert "beyond the budget" in graphs.stats()["s"].refused and "beyond the budget" in "".join(graphs.notes())
    assert torch.equal(run(43), torch.ones(43)) and backend.resets == 2
    assert torch.equal(run(10), torch.ones(10)) and graphs.pool_bytes == 40


def test_room_is_made_where_others_fill_the_pool():
    backend = FakeGraphs(needs=lambda outputs: outputs.nbytes)
    grow = backend.record
    backend.record = lambda run, inputs: (*grow(run, inputs)[:2], 60)  # every graph adds to the pool
    graphs = Captures(backend, budget=100)
    f = lambda x: x + 1
    for n in (1, 2, 1):
        assert torch.equal(graphs("s", f, f, torch.zeros(n)), torch.ones(n))
    assert graphs.stats()["s"].kept == 1 and backend.resets == 2 and graphs.pool_bytes == 60


def failing(run, inputs):
    raise RuntimeError("operation not permitted when stream is capturing\nlong story")


def test_what_cannot_be_recorded_runs_without_or_raises():
    backend = FakeGraphs()
    backend.record = failing
    f = lambda x: x + 1
    graphs = Captures(backend)
    for _ in range(2):
        assert torch.equal(graphs("s", f, f, torch.zeros(3)), torch.ones(3))
    refused = graphs.stats()["s"].refused
    assert "not permitted" in refused and "long story" not in refused
    with pytest.raises(DeviceError, match="stage s: recording failed"):
        Captures(backend, strict=True)("s", f, f, torch.zeros(3))


def test_threads_get_their_own_results():
    graphs, wrong = Captures(FakeGraphs(), entries=3), []

    def f(x):
        return x.cumsum(0)

    def work(seed):
        for n in range(60):
            x = torch.full((1 + (n + seed) % 5,), float(seed))
            if not torch.equal(graphs("s", f, f, x), f(x)):
                wrong.append((seed, n))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and graphs.stats()["s"].replayed == 240


def test_clear_gives_everything_back():
    backend = FakeGraphs()
    graphs = Captures(backend)
    f = lambda x: x + 1
    graphs("s", f, f, torch.zeros(3))
    graphs.clear()
    assert graphs.nbytes == backend.pool == 0 and graphs.stats()["s"].evicted == 1


def test_buckets():
    assert [bucket(n) for n in (1, BUCKET, BUCKET + 1, 100)] == [BUCKET, BUCKET, 2 * BUCKET, 128]


def test_modes():
    assert open_captures("off", CPU) is None and open_captures("auto", torch.device("mps")) is None
    assert isinstance(open_captures("auto", CPU).backend, CpuGraphs)
    with pytest.raises(DeviceError, match="capture='graphs' records CUDA graphs"):
        open_captures("graphs", CPU)


CALLS = [["a red circle"], ["two"], ["a", "a blue square above a green one"], ["a red circle", "b"]]


def record(pipe, captures):
    """Has every stage of a loaded pipeline recorded by `captures`."""
    for stage in filter(None, (pipe.text, pipe.velocity, pipe.vae, pipe.preview)):
        stage.options = replace(stage.options, captures=captures)


@pytest.fixture(scope="module", params=FAMILIES)
def pipes(request, tmp_path_factory):
    """Without graphs, and with."""
    folder = make_model(tmp_path_factory.mktemp(request.param) / "m", request.param)
    plain, recorded = load(folder, device="cpu", capture="off"), load(folder, device="cpu")
    record(recorded, Captures(FakeGraphs(), strict=True))
    return plain, recorded


def both(pipes, prompts, **changes):
    size = 2 * pipes[0].sizes.multiple
    args = {"height": size, "width": size, "seed": 3, "output": "pt"} | changes
    expected, ours = (pipe(prompts, **args).images for pipe in pipes)
    assert ours.shape == expected.shape and (ours - expected).abs().max() < 1e-4
    return {name: stats.recorded for name, stats in pipes[1].captures.stats().items()}


def test_prompts_of_one_bucket_share_the_graphs_of_every_stage(pipes):
    """Images are those of the plain pipeline, padding or not."""
    made = [both(pipes, prompts) for prompts in CALLS]
    text = next(name for name in made[0] if name.startswith("text"))
    assert {*made[0]} == {text, "context", "velocity", "decode"}
    assert made[0]["velocity"] == made[1]["velocity"] == 1 == made[1]["decode"] == made[1]["context"]
    assert made[2]["decode"] == made[3]["decode"] == 2  # one per batch size
    before = dict(made[-1])
    assert both(pipes, CALLS[0], seed=9) == before  # nothing new
    assert "graphs of velocity" in str(pipes[1].plan)


def test_nothing_is_recorded_twice(pipes):
    """Sizes, batches and prompt lengths come and go; what was seen before is replayed, whatever came between."""
    multiple = pipes[0].sizes.multiple
    sizes = [(2 * multiple, multiple), (multiple, 3 * multiple)]
    made = []
    for seed in (1, 2):
        for height, width in sizes:
            for prompts in CALLS:
                counts = both(pipes, prompts, height=height, width=width, seed=seed)
            made.append(counts)
    small, large, *again = made
    assert again == [large, large] and large["decode"] == small["decode"] + 2  # one per batch size
    assert all(large[name] == small[name] for name in small if name.startswith(("text", "context")))  # no size in those


def set_tile(tile, *decoders):
    for decoder in decoders:
        decoder.options = replace(decoder.options, tile=tile)


def test_tiles_share_one_graph(pipes):
    """Whatever the tile's place; with another size of image, too, that is cut into tiles of that size."""
    plain, recorded = (pipe.vae for pipe in pipes)
    network, graphs = plain.network, recorded.options.captures
    core, far = tiles.smallest(network) // tiles.cell(network), tiles.margin(network)
    wide = core * -(-(core + 2 * far) // core)  # latents
    set_tile(tiles.smallest(network), plain, recorded)
    try:
        for made, width in ((1, wide), (2, 2 * wide), (2, wide)):
            latents = torch.randn(1, plain.channels, 1, width, generator=torch.Generator().manual_seed(made))
            before = graphs.stats().get("decode tile", Stats()).replayed
            with torch.inference_mode():
                assert torch.equal(recorded.decode(latents), plain.decode(latents))
            stats = graphs.stats()
            assert (stats["decode trunk"].recorded, stats["decode tile"].recorded) == (made, 1)
            cells = width * plain.scale // tiles.cell(network)
            assert stats["decode tile"].replayed - before == cells // core > 1
    finally:
        set_tile(None, plain, recorded)


def test_blocks_that_stream_are_not_recorded_and_the_plan_says_why(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "m")
    budget = least(folder, device="cpu")
    pipes = load(folder, device="cpu"), load(folder, device="cpu", memory_budget=budget)
    record(pipes[1], Captures(FakeGraphs()))
    made = both(pipes, CALLS[0], height=64, width=64)
    assert made["text"] == made["velocity"] == 0 and made["context"] == 1
    stats = pipes[1].captures.stats()
    assert all("its blocks stream" in stats[name].refused for name in ("text", "velocity"))
    assert "graphs of velocity: 0 kept" in str(pipes[1].plan) and "launches are hidden" in str(pipes[1].plan)
    monkeypatch.setattr("twinflow_rt.loading.open_captures", lambda *args: Captures(FakeGraphs(), strict=True))
    with pytest.raises(ConfigError, match="blocks stream; text: its graph would hold"):
        load(folder, device="cpu", memory_budget=budget)


def test_graphs_of_every_schedule_are_kept(pipes):
    recorded = [both(pipes, CALLS[0], nfe=nfe)["velocity"] for nfe in (2, 1, 3)][-1]
    assert all(both(pipes, CALLS[1], nfe=nfe, seed=7)["velocity"] == recorded for nfe in (1, 3, 2, 1))
    assert pipes[1].captures.stats()["velocity"].kept >= 1 + 2 + 3  # one per evaluation


def test_an_adapter_forgets_them_too(tmp_path):
    from safetensors.torch import save_file

    folder = make_model(tmp_path / "m")
    name, g = "transformer.layers.0.attention.to_k", torch.Generator().manual_seed(0)
    factors = {"A": torch.randn(2, 48, generator=g), "B": torch.randn(48, 2, generator=g)}
    save_file({f"{name}.lora_{k}.weight": v for k, v in factors.items()}, tmp_path / "a.safetensors")
    pipes = load(folder, device="cpu"), load(folder, device="cpu")
    record(pipes[1], Captures(FakeGraphs(), strict=True))
    both(pipes, CALLS[0])
    for pipe in pipes:
        pipe.set_loras([tmp_path / "a.safetensors"])
    assert both(pipes, CALLS[0])["velocity"] == 2


def test_large_images_are_left_alone_unless_asked_for(pipes, monkeypatch):
    monkeypatch.setattr("twinflow_rt.stages.velocity.AUTO_POSITIONS", 1)
    graphs = pipes[1].captures
    monkeypatch.setattr(graphs, "strict", False)
    before = dict(graphs.stats())
    both(pipes, CALLS[0])
    assert graphs.stats()["velocity"] == before["velocity"]
