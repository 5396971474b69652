"""Weights that come and go by block: the same images, and nothing held that should not be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.factory import FAMILIES, make_model
from tests.memory import least
from twinflow_rt.bench.random_weights import skeleton
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.reading import assign
from twinflow_rt.errors import ConfigError
from twinflow_rt.families import family_of
from twinflow_rt.loading import load
from twinflow_rt.models.text_encoders.language_model import embed
from twinflow_rt.passes.blocks import token_tables
from twinflow_rt.runtime.streaming import Buffers, Stream, Streaming, block_names, parameters_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp(request.param) / "m", request.param)


@pytest.fixture(scope="module")
def plain(folder):
    return load(folder, device="cpu")


def test_images_are_those_of_the_resident_model(folder, plain):
    size = 2 * plain.sizes.multiple
    options = {"device": "cpu", "largest": (size, size, 2)}
    pipe = load(folder, memory_budget=least(folder, **options), **options)
    assert pipe.memory.streamed > 0 and pipe.memory.text_streams and "stream" in str(pipe.plan)
    for prompts, nfe in ((["a red circle"], 1), (["a", "two blue squares"], 1), (["a red circle"], 2)):
        args = {"height": size, "width": size, "seed": 3, "output": "latent", "nfe": nfe}
        expected = plain(prompts, **args).images
        assert (pipe(prompts, **args).images - expected).abs().max() < 1e-4 * expected.abs().max()
        network = pipe.program.network
        for block in block_names(network)[-pipe.memory.streamed :]:
            assert all(network.get_parameter(name).is_meta for name in parameters_of(network, block))
        assert all(not p.is_meta for n, p in network.named_parameters() if n.startswith(network.prompt_modules))
    with pytest.raises(ConfigError, match="weights stream"):
        pipe.save(folder.parent / "saved")


def test_only_so_many_blocks_stream(folder, plain):
    """The first stay."""
    from twinflow_rt.compile import Recipe, compile_network

    recipe = plain.program.recipe
    network = plain.program.network
    streaming = Recipe(recipe.source, recipe.family, CPU, torch.float32, streamed=1)
    program = compile_network(streaming, plain.program.schedule)
    blocks = block_names(network)
    names = parameters_of(program.network, blocks[-1])
    assert names and {n for n, p in program.network.named_parameters() if p.is_meta} == set(names)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_8_bits_stream_bit_for_bit(folder, precision):
    """At two evaluations, where no constants go into weights: those would be others before quantization. fp8 is
    emulated here."""
    how = {"device": "cpu", "nfe": 2, "precision": precision, "text_precision": precision}
    plain = load(folder, **how)
    size = 2 * plain.sizes.multiple
    options = {**how, "largest": (size, size, 2)}
    pipe = load(folder, memory_budget=least(folder, **options), **options)
    assert pipe.memory.streamed > 0 and pipe.memory.text_streams
    args = {"height": size, "width": size, "seed": 3, "output": "latent"}
    for prompts in (["a red circle"], ["a", "two blue squares"]):
        assert torch.equal(pipe(prompts, **args).images, plain(prompts, **args).images)
    network, kinds = pipe.program.network, {layers.kind: layers.count for layers in pipe.plan.layers}
    if plain.plan.family in ("sd3.5", "sana"):  # layers here are too narrow for 8 bits
        assert precision not in kinds
        return
    assert kinds == {layers.kind: layers.count for layers in plain.plan.layers} and kinds[precision]
    assert pipe.program.plan.bytes_after == plain.program.plan.bytes_after
    for block in block_names(network)[-pipe.memory.streamed :]:
        assert all(network.get_parameter(name).is_meta for name in parameters_of(network, block))
        assert any(name.endswith("weight_scale") for name in parameters_of(network, block))


class FakeLane:
    """Does copies when they are waited for, and checks that no buffer is written while it may be read."""

    def __init__(self):
        self.queued, self.reading, self.copies = {0: [], 1: []}, set(), 0

    def copy(self, slot, target, source):
        assert slot not in self.reading
        target.fill_(255)  # what was there is gone
        self.queued[slot].append((target, source))
        self.copies += 1

    def filled(self, slot):
        for target, source in self.queued[slot]:
            target.copy_(source)
        self.queued[slot].clear()
        self.reading.add(slot)

    def free(self, slot):
        self.reading.discard(slot)


@pytest.mark.parametrize("how", [
    {}, {"precision": "int8", "text_precision": "int8"}, {"precision": "fp8"},
    {"precision": "int4", "skip_layers": ["layers.0.feed_forward.w2:w4a16"]},
], ids=str)  # fmt: skip
def test_blocks_on_the_host_go_through_the_buffers(tmp_path, monkeypatch, how):
    """As for a GPU: quantized while loading, kept on the host, copied into two buffers in turn."""
    lanes = []

    def buffers(device, lane, pinned):
        assert pinned
        lanes.append(FakeLane())
        return Buffers(device, lanes[-1], pinned=False)

    folder = make_model(tmp_path / "m")
    plain = load(folder, device="cpu", nfe=2, **how)
    budget = least(folder, device="cpu", nfe=2, **how)
    monkeypatch.setattr(Streaming, "mapped", False)
    monkeypatch.setattr("twinflow_rt.runtime.streaming.CudaLane", lambda device: None)
    monkeypatch.setattr("twinflow_rt.runtime.streaming.Buffers", buffers)
    pipe = load(folder, device="cpu", nfe=2, memory_budget=budget, **how)
    assert pipe.memory.streamed and len(lanes) == 2
    for seed in range(3):
        args = {"height": 64, "width": 64, "seed": seed, "output": "latent"}
        ours, expected = pipe("a red circle", **args).images, plain("a red circle", **args).images
        exact = "precision" in how  # else layers of the plain one are packed
        assert torch.equal(ours, expected) if exact else (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(lane.copies > 2 for lane in lanes)


@pytest.mark.parametrize(
    ("name", "tables"),
    [("z-image", ["embed_tokens"]), ("sd3.5-m", ["embeddings.token_embedding"] * 2 + ["shared"])],
)
def test_a_row_per_token_is_found(tmp_path, name, tables):
    folder = skeleton(name, tmp_path / "m", scale=0.1, layers=1)
    config = Checkpoint(folder / "transformer").config
    text, _, _ = family_of(config).open(folder, config)
    assert [token_tables(part.network) for part in text.parts] == [[f"{table}.weight"] for table in tables]


def test_tokens_are_looked_up_where_their_table_is():
    """On the host, for a GPU that blocks stream through; tensors without values say where they are."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        ids = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
        for place in ("cpu", "cuda"):
            rows = embed(ids, torch.zeros(7, 5, device=place))
            assert (rows.device.type, rows.shape) == ("cuda", (2, 3, 5))


class Steps(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3 + i, 4 + i) for i in range(count))

    def forward(self, x, stop=None):
        for i, block in enumerate(self.blocks):
            if i == stop:
                raise KeyboardInterrupt
            x = block(x).tanh()
        return x


def blank(network):
    for name, p in list(network.named_parameters()):
        assign(network, name, torch.empty_like(p, device="meta"))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_two_buffers_in_turn(count):
    network, x = Steps(count), torch.randn(2, 3)
    expected, lane = network(x).detach(), FakeLane()
    store, blocks = Buffers(CPU, lane, pinned=False), block_names(network)
    assert blocks == [f"blocks.{i}" for i in range(count)]
    for block in blocks:
        names = parameters_of(network, block)
        store.add({name: network.get_parameter(name).detach() for name in names})
    blank(network)
    store.ready()
    Stream(network, blocks, store)
    for _ in range(3):
        assert torch.equal(network(x).detach(), expected)
    # each block once a run, and the next run's first; two blocks stay in the two buffers
    assert lane.copies == {1: 2, 2: 2, 5: 3 * 5 + 1}[count]
    for stop in range(1, count):
        with pytest.raises(KeyboardInterrupt):
            network(x, stop=stop)
        assert torch.equal(network(x).detach(), expected)
    assert all(p.is_meta for p in network.parameters())
    lane.reading.clear()


def test_a_block_that_raises_loses_its_weights():
    network = Steps(2)

    class Once:
        def bring(self, block):
            out = 4 + block
            return {f"blocks.{block}.weight": torch.ones(out, out - 1), f"blocks.{block}.bias": torch.ones(out)}

        def done(self, block):
            self.last = block

    blank(network)
    store = Once()
    Stream(network, block_names(network), store)
    with pytest.raises(RuntimeError, match="shapes"):
        network(torch.ones(1, 9))
    assert all(p.is_meta for p in network.parameters()) and store.last == 0
