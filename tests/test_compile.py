"""Compiled programs against the networks they came from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factory import TRANSFORMER, make_model, randomize
from twinflow_rt.compile import compile_network
from twinflow_rt.errors import ConfigError
from twinflow_rt.models import family_of
from twinflow_rt.models.z_image import FUSED, ZImageConfig, ZImageTransformer
from twinflow_rt.ops import rms_norm
from twinflow_rt.passes.fold import fold, folded_away
from twinflow_rt.passes.load import Checkpoint, materialize

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
    return compile_network(checkpoint, family_of(checkpoint.config), schedule, device=CPU, dtype=dtype)


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


@pytest.mark.parametrize("schedule", [ONE, FOUR])
def test_folded_bfloat16_is_as_exact_as_unfolded(checkpoint, unfolded, schedule):
    """End to end, error against float32 on the same bf16-rounded inputs."""
    program, half = compiled(checkpoint, schedule, torch.bfloat16), load_unfolded(checkpoint, torch.bfloat16)
    args = inputs(2, 8, 12, (9, 33), torch.bfloat16)
    wide = (args[0].float(), args[1].float(), args[2])
    for step, (t, tt) in enumerate(schedule):
        exact = run_unfolded(unfolded, wide, t, tt)
        error, bound = (
            (run(net, args, *at).double() - exact).pow(2).mean().sqrt()
            for run, net, at in ((run_folded, program.network, (step,)), (run_unfolded, half, (t, tt)))
        )
        assert error <= 1.1 * bound


def test_each_block_in_bfloat16_is_as_exact_as_unfolded(checkpoint, unfolded):
    half, program = load_unfolded(checkpoint, torch.bfloat16), compiled(checkpoint, ONE, torch.bfloat16)
    one, zero = torch.ones(1), torch.zeros(1)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, unfolded.config.dim, generator=g).bfloat16()
    rope = unfolded._context_rope(32, CPU)
    folded, bound_mod, exact_mod = program.network.step_modulation(0), half.modulate(one, zero), unfolded.modulate(one, zero)
    offset = len(unfolded.noise_refiner)
    for i, block in enumerate(unfolded.layers):

        def run(layer, x, modulation, ops=unfolded.ops, i=i):
            norms = modulation.blocks[offset + i]
            with torch.no_grad():
                return layer(x, rms_norm(x, norms[:, :1], layer.eps), norms, None, rope, None, ops)[0].double()

        exact = run(block, x.float(), exact_mod)
        error = (run(program.network.layers[i], x, folded) - exact).pow(2).mean()
        assert error <= 1.1**2 * (run(half.layers[i], x, bound_mod) - exact).pow(2).mean()


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
    network = randomize(ZImageTransformer(config), seed)
    with torch.device("meta"):
        shell = ZImageTransformer(config)
    folded = ZImageTransformer(config, folded_steps=len(times))
    weights, away = network.state_dict(), folded_away(shell, folded)
    tables = fold(shell, weights.__getitem__, times)
    folded.load_state_dict({**{k: v for k, v in weights.items() if k not in away}, **tables})
    latents, embeds = torch.randn(2, 2, 4, 6), torch.randn(2, 5, 8)
    for step, (t, tt) in enumerate(times):
        expected = run_unfolded(network, (latents, embeds, (5, 3)), t, tt)
        assert relative(run_folded(folded, (latents, embeds, (5, 3)), step), expected) < 1e-5
    assert all(p.is_meta for p in shell.parameters())  # nothing stays behind


def test_what_is_folded_is_gone(checkpoint):
    program = compiled(checkpoint, ONE)
    names = [n for n, _ in program.network.named_parameters()]
    assert not any("t_embedder" in n or "adaLN" in n or "attention_norm" in n for n in names)
    after = sum(p.numel() for p in program.network.parameters())
    assert (program.plan.parameters_after, program.plan.parameters_before) == (
        after, sum(after * 0 + n for n in program.plan.folded.values()) + after,
    )  # fmt: skip
    assert "op           attention" in str(program.plan)


def test_full_size_z_image_keeps_at_most_6_03_billion():
    with torch.device("meta"):
        full, folded = ZImageTransformer(ZImageConfig()), ZImageTransformer(ZImageConfig(), folded_steps=1)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
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


@pytest.mark.parametrize("n", [0, 101])
def test_schedule_length_is_bounded(checkpoint, n):
    with pytest.raises(ConfigError, match="1 to 100"):
        compiled(checkpoint, ((1.0, 0.0),) * n)


def test_fused_weights_are_the_checkpoints_rows(checkpoint):
    network = compiled(checkpoint, ONE).network
    for merged, parts in FUSED.items():
        rows = torch.cat([checkpoint.get(f"layers.1.{part}") for part in parts])
        assert torch.equal(network.get_parameter(f"layers.1.{merged}"), rows)
