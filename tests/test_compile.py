"""Compiled programs against the networks they came from."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factory import TRANSFORMER, make_model, randomize
from tests.networks import merge
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.reading import materialize
from twinflow_rt.compile import Recipe, compile_network
from twinflow_rt.errors import ConfigError
from twinflow_rt.families import family_of, z_image
from twinflow_rt.loading import DEMO
from twinflow_rt.models.transformers.z_image import FUSED, ZImageConfig, ZImageTransformer
from twinflow_rt.ops import rms_norm
from twinflow_rt.passes.fold import Folded, ScheduleTables, fold

CPU = torch.device("cpu")
ONE, FOUR = ((1.0, 0.0),), ((0.999, 0.0), (0.75, 0.0), (0.5, 0.5), (0.25, 0.1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint(make_model(tmp_path_factory.mktemp("model") / "m") / "transformer")


@pytest.fixture(scope="module")
def unfolded(checkpoint):
    return load_unfolded(checkpoint, torch.float32)


def load_unfolded(checkpoint: Checkpoint, dtype: torch.dtype) -> ZImageTransformer:
    family = family_of(checkpoint.config)
    with torch.device("meta"):
        network = ZImageTransformer(ZImageConfig.from_dict(checkpoint.config))
    materialize(network, checkpoint, family.layout, CPU, dtype)
    return network


def compiled(checkpoint: Checkpoint, schedule, dtype=torch.float32):
    return compile_network(Recipe(checkpoint, family_of(checkpoint.config), CPU, dtype), schedule)


def inputs(batch: int, height: int, width: int, lengths: tuple[int, ...], dtype=torch.float32):
    g = torch.Generator().manual_seed(batch + height)
    latents = torch.randn(batch, TRANSFORMER["in_channels"], height, width, generator=g).to(dtype)
    embeds = torch.randn(batch, max(lengths), TRANSFORMER["cap_feat_dim"], generator=g).to(dtype)
    return latents, embeds, lengths


def run_unfolded(network, args, t, tt):
    latents, embeds, lengths = args
    times = (torch.tensor([v], dtype=torch.float64) for v in (t, tt))
    with torch.no_grad():
        return network(latents, network.modulate(*times), network.encode_context(embeds, lengths))


def run_folded(network, args, step):
    latents, embeds, lengths = args
    with torch.no_grad():
        return network(latents, network.step_modulation(step), network.encode_context(embeds, lengths))


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize("schedule", [ONE, FOUR])
@pytest.mark.parametrize("shape", [(1, 16, 16, (20,)), (3, 6, 10, (7, 40, 33)), (2, 20, 4, (64, 64))])
def test_folded_float32_equals_unfolded(checkpoint, unfolded, schedule, shape):
    program = compiled(checkpoint, schedule)
    args = inputs(*shape)
    for step, (t, tt) in enumerate(schedule):
        assert relative(run_folded(program.network, args, step), run_unfolded(unfolded, args, t, tt)) < 1e-5


SIZES = {
    "narrow": ZImageConfig(
        in_channels=4, dim=48, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=(8, 8, 8), axes_lens=(256, 32, 32),
    ),
    "odd": ZImageConfig(
        in_channels=4, dim=180, n_layers=2, n_refiner_layers=2, n_heads=5, n_kv_heads=5, cap_feat_dim=32,
        axes_dims=(12, 12, 12), axes_lens=(256, 32, 32),
    ),
    "released heads": ZImageConfig(
        in_channels=4, dim=384, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=32,
        axes_lens=(256, 32, 32),
    ),
}  # fmt: skip
SHIPPED = pytest.param("demo", marks=pytest.mark.skipif(not DEMO.is_dir(), reason="no demo model beside the package"))


@dataclass
class Networks:
    """Weights as a bfloat16 checkpoint holds them, in the unfolded network and in the folded one."""

    config: ZImageConfig
    weights: dict[str, torch.Tensor]

    def unfolded(self, dtype: torch.dtype) -> ZImageTransformer:
        return self._fill(ZImageTransformer(self.config), dtype, {})

    def folded(self, dtype: torch.dtype, times) -> ZImageTransformer:
        with torch.device("meta"):
            shell = ZImageTransformer(self.config)
        tables = fold(shell, self.weights.__getitem__, times)
        assert all(p.is_meta for p in shell.parameters())  # nothing stays behind
        return self._fill(ZImageTransformer(self.config, folded_steps=len(times)), dtype, tables)

    def _fill(self, network, dtype, tables):
        cast = {k: v.to(z_image().layout.dtype_of(k, dtype)) for k, v in self.weights.items()}
        network.load_state_dict({k: tables[k] if k in tables else cast[k] for k in network.state_dict()}, assign=True)
        return network.eval()

    def inputs(self, height: int, width: int, lengths: tuple[int, ...], dtype=torch.float32):
        g = torch.Generator().manual_seed(height)
        latents = torch.randn(len(lengths), self.config.in_channels, height, width, generator=g).to(dtype)
        embeds = torch.randn(len(lengths), max(lengths), self.config.cap_feat_dim, generator=g).to(dtype)
        return latents, embeds, lengths


@pytest.fixture(scope="module", params=[*SIZES, SHIPPED])
def networks(request):
    """Random weights at several sizes, and the shipped model's trained ones."""
    if request.param == "demo":
        checkpoint = Checkpoint(DEMO / "transformer")
        config = ZImageConfig.from_dict(checkpoint.config)
        weights = merge({k: checkpoint.get(k) for k in checkpoint}, FUSED)
    else:
        config = SIZES[request.param]
        weights = randomize(ZImageTransformer(config), 5).state_dict()
    return Networks(config, {k: v.to(z_image().layout.dtype_of(k, torch.bfloat16)) for k, v in weights.items()})


BATCHES = [(8, 8, (20,)), (6, 10, (7, 33))]


def test_folded_float32_equals_unfolded_at_several_sizes(networks):
    unfolded, folded = networks.unfolded(torch.float32), networks.folded(torch.float32, FOUR)
    one = networks.folded(torch.float32, ONE)
    for batch in BATCHES:
        args = networks.inputs(*batch)
        assert relative(run_folded(one, args, 0), run_unfolded(unfolded, args, 1.0, 0.0)) < 1e-5
        for step, (t, tt) in enumerate(FOUR):
            assert relative(run_folded(folded, args, step), run_unfolded(unfolded, args, t, tt)) < 1e-5


def test_folded_bfloat16_is_as_exact_as_unfolded(networks):
    """End to end: mean square error against float32 on the same bfloat16 weights and inputs."""
    exact, half = networks.unfolded(torch.float32), networks.unfolded(torch.bfloat16)
    folded = networks.folded(torch.bfloat16, FOUR)
    errors = torch.zeros(2, dtype=torch.float64)
    for batch in BATCHES:
        args = networks.inputs(*batch, torch.bfloat16)
        wide = (args[0].float(), args[1].float(), args[2])
        for step, (t, tt) in enumerate(FOUR):
            truth = run_unfolded(exact, wide, t, tt)
            outs = run_folded(folded, args, step), run_unfolded(half, args, t, tt)
            errors += torch.stack([(out.double() - truth).square().mean() for out in outs])
    error, bound = errors.sqrt()
    assert error <= 1.1 * bound


def test_each_block_in_bfloat16_is_as_exact_as_unfolded(networks):
    """The same per block, the prompt's refiner included: every one gets the same bfloat16 input."""
    exact, half = networks.unfolded(torch.float32), networks.unfolded(torch.bfloat16)
    folded, times = networks.folded(torch.bfloat16, ONE), (torch.ones(1), torch.zeros(1))
    rope = exact._context_rope(32, CPU)
    x = torch.randn(2, 32, exact.config.dim, generator=torch.Generator().manual_seed(0)).bfloat16()

    def outputs(network, modulation, x):
        prompt = [b.norm_table if hasattr(b, "norm_table") else b.norm_weights() for b in network.context_refiner]
        blocks = (*network.noise_refiner, *network.layers, *network.context_refiner)
        for block, norms in zip(blocks, (*modulation.blocks, *prompt), strict=True):
            h = rms_norm(x, norms[:, :1], block.eps)
            yield block(x, h, norms.unsqueeze(2).unbind(1), None, rope, None, network.ops)[0].double()

    with torch.no_grad():
        runs = [
            outputs(exact, exact.modulate(*times), x.float()),
            outputs(folded, folded.step_modulation(0), x), outputs(half, half.modulate(*times), x),
        ]  # fmt: skip
        for truth, ours, theirs in zip(*runs, strict=True):
            error, bound = ((out - truth).square().mean().sqrt() for out in (ours, theirs))
            assert error <= 1.1 * bound


@settings(max_examples=12, deadline=None)
@given(
    heads=st.integers(1, 4), half=st.integers(1, 3), layers=st.integers(1, 3), refiners=st.integers(0, 2),
    times=st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), min_size=1, max_size=8), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_network_folds(heads, half, layers, refiners, times, seed):
    config = ZImageConfig(
        in_channels=2, dim=12 * half * heads, n_layers=layers, n_refiner_layers=refiners, n_heads=heads,
        n_kv_heads=heads, cap_feat_dim=8, axes_dims=(4 * half,) * 3, axes_lens=(128, 8, 8),
    )  # fmt: skip
    networks = Networks(config, randomize(ZImageTransformer(config), seed).state_dict())
    unfolded, folded = networks.unfolded(torch.float32), networks.folded(torch.float32, times)
    args = networks.inputs(4, 6, (5, 3))
    for step, (t, tt) in enumerate(times):
        assert relative(run_folded(folded, args, step), run_unfolded(unfolded, args, t, tt)) < 1e-5


def test_what_is_folded_is_gone(checkpoint):
    program = compiled(checkpoint, ONE)
    names = [n for n, _ in program.network.named_parameters()]
    assert not any("t_embedder" in n or "adaLN" in n or "attention_norm" in n for n in names)
    plan, after = program.plan, sum(p.numel() for p in program.network.parameters())
    assert plan.parameters_after == after == plan.parameters_before - sum(plan.folded.values())
    assert plan.pruned == {}  # every parameter of Z-Image is read by something
    assert "op           attention" in str(program.plan)


@pytest.mark.parametrize("schedule", [ONE, FOUR])
def test_every_tensor_is_read_once(checkpoint, schedule, monkeypatch):
    """Folded away or kept: nothing twice, nothing left out."""
    read, get = [], Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", lambda *args, **kwargs: read.append(args[1]) or get(*args, **kwargs))
    compiled(checkpoint, schedule)
    assert sorted(read) == sorted(checkpoint)


def test_full_size_z_image_keeps_at_most_6_03_billion():
    with torch.device("meta"):
        full, folded = ZImageTransformer(ZImageConfig()), ZImageTransformer(ZImageConfig(), folded_steps=1)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert 6.15e9 < count(full) < 6.16e9
    assert count(folded) <= 6.03e9


def test_refold_equals_compiling_anew_and_stays_bounded(checkpoint):
    program = compiled(checkpoint, ONE)
    program.refold(FOUR)
    fresh = compiled(checkpoint, FOUR)
    for name, tensor in fresh.network.state_dict().items():
        assert torch.equal(program.network.state_dict()[name], tensor), name
    program.recipe = None  # as after loading an artifact
    with pytest.raises(ConfigError, match=r"folded for 4 evaluation\(s\)"):
        program.refold(ONE)


def test_constants_of_schedules_seen_before_are_not_folded_again(checkpoint, monkeypatch):
    program = compiled(checkpoint, FOUR)
    read, get = [], Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", lambda *args, **kwargs: read.append(args[1]) or get(*args, **kwargs))
    keys = [program.constants]
    for schedule in (ONE, FOUR, ONE, FOUR):
        program.refold(schedule)
        keys.append(program.constants)
        if len(keys) == 2:
            assert read
            read.clear()
    assert not read and keys[0] == keys[2] == keys[4] != keys[1] == keys[3]
    fresh = compiled(checkpoint, FOUR).network.state_dict()
    assert all(torch.equal(program.network.state_dict()[name], tensor) for name, tensor in fresh.items())


@pytest.mark.parametrize("changes", [{"tables_bytes": 0}, {"tables_bytes": 40_000}])
def test_constants_of_other_schedules_take_bounded_memory(checkpoint, changes):
    recipe = Recipe(checkpoint, family_of(checkpoint.config), CPU, torch.float32, **changes)
    program = compile_network(recipe, ONE)
    for n in range(2, 40):
        program.refold(tuple((1 - i / n, 0.0) for i in range(n)))
        held = [folded.tables for folded in program._folded._kept.values()]
        assert len(held) == 1 or program._folded.nbytes <= recipe.tables_bytes
        assert all(any(t is b for b in program.network.buffers()) for t in held[-1].values())


def test_constants_kept_elsewhere_are_copies(checkpoint):
    """Tables live on `home`; a recording of the network goes with their key only while it has those very tensors."""
    meta, made = torch.device("meta"), {"table": torch.ones(2)}
    kept = ScheduleTables(0, meta).get(ONE, lambda: made)
    assert kept.tables["table"].device == meta and kept.tables["table"].shape == (2,)
    assert ScheduleTables(0, CPU).get(ONE, lambda: made).tables["table"] is made["table"]
    program = compiled(checkpoint, FOUR)
    tables = {name: program.network.get_buffer(name) for name in program._folded.get(FOUR, dict).tables}
    same, copies = Folded(tables), Folded({name: table.clone() for name, table in tables.items()})
    program._use(same)
    assert program.constants is same.key
    program._use(copies)
    assert program.constants not in (same.key, copies.key)


@pytest.mark.parametrize("n", [0, 101])
def test_schedule_length_is_bounded(checkpoint, n):
    with pytest.raises(ConfigError, match="1 to 100"):
        compiled(checkpoint, ((1.0, 0.0),) * n)


def test_fused_weights_are_the_checkpoints_rows(checkpoint):
    weights = compiled(checkpoint, ONE).network.state_dict()
    for merged, parts in FUSED.items():
        rows = torch.cat([checkpoint.get(f"layers.1.{part}") for part in parts])
        assert torch.equal(weights[f"layers.1.{merged}"], rows)
