"""SANA and SANA-Sprint against diffusers' network, folded, absorbed, and with TwinFlow's second embedder."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.qwen_image_factory import relative, save
from tests.sana_factory import SHAPES, SMALL, SPRINT, TwinFlowReference, inputs, ours, run, run_step
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.fuse import merge, split
from twinflow_rt.compile import Recipe, compile_network
from twinflow_rt.errors import ConfigError
from twinflow_rt.families import sana
from twinflow_rt.models.layers import PLAIN
from twinflow_rt.models.transformers.sana import FUSED, SanaConfig, SanaTransformer
from twinflow_rt.ops import linear_attention
from twinflow_rt.passes.fold import absorb, fold, folded_away

ONE, FOUR = ((1.0, 0.0),), ((0.999, 0.0), (0.75, 0.0), (0.5, 0.5), (0.25, 0.1))
CONFIGS = pytest.mark.parametrize("config", [SMALL, SPRINT], ids=["sana", "sprint"])


@pytest.fixture(scope="module")
def references():
    return {config: TwinFlowReference(config) for config in (SMALL, SPRINT)}


def folded(tensors, config, schedule, absorbed=False):
    weights = merge(tensors, FUSED)
    with torch.device("meta"):
        shell = SanaTransformer(config)
    tables = fold(shell, weights.__getitem__, schedule)
    network = SanaTransformer(config, folded_steps=len(schedule), absorbed=absorbed)
    if absorbed:
        dtype = weights["proj_out.weight"].dtype
        taken = absorb(network.absorptions(), tables, weights.__getitem__)
        weights |= {name: tensor.to(dtype) for name, tensor in taken}
    weights |= tables
    network.load_state_dict({k: weights[k] for k in network.state_dict()}, assign=True)
    return network.eval()


@CONFIGS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [1.0, 0.37])
def test_equals_diffusers_where_the_second_embedder_is_silent(references, config, shape, t):
    args = inputs(shape)
    network = ours(references[config].tensors(), config)
    assert relative(run(network, args, t, t), references[config].velocity(*args, t)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("times", [(1.0, 0.0), (0.6, 0.25), (-0.75, -0.5)])
def test_equals_diffusers_with_twinflows_formula(references, shape, times):
    args, reference = inputs(shape), references[SMALL]
    expected = reference.velocity(*args, *times)
    assert relative(run(ours(reference.tensors()), args, *times), expected) < 1e-5
    # the second embedder is really there: leaving it out is another function
    assert relative(reference.velocity(*args, times[0]), expected) > 1e-2


@CONFIGS
@pytest.mark.parametrize("schedule", [ONE, FOUR])
def test_tables_equal_diffusers(references, config, schedule):
    network = folded(references[config].tensors(), config, schedule)
    for shape in SHAPES:
        args = inputs(shape)
        for step, times in enumerate(schedule):
            assert relative(run_step(network, args, step), references[config].velocity(*args, *times)) < 1e-5


@CONFIGS
@pytest.mark.parametrize("times", [(1.0, 0.0), (0.4, 0.1)])
def test_absorbed_equals_diffusers(references, config, times):
    network = folded(references[config].tensors(), config, (times,), absorbed=True)
    assert not list(network.buffers())
    assert all(constants == PLAIN for constants in network.step_modulation(0).blocks)
    for shape in SHAPES:
        args = inputs(shape)
        assert relative(run_step(network, args, 0), references[config].velocity(*args, *times)) < 1e-5


@CONFIGS
@pytest.mark.parametrize(("precision", "bar"), [(None, 1e-5), ("int8", 0.05)])
def test_compiles_wide_enough_for_packed_and_quantized_layers(tmp_path, config, precision, bar):
    """Layers of 32 and more take other forms on a CPU."""
    config = replace(
        config, num_attention_heads=4, attention_head_dim=32, cross_attention_dim=128, cross_attention_head_dim=64,
        caption_channels=96,
    )  # fmt: skip
    reference = TwinFlowReference(config)
    source = Checkpoint(save(tmp_path / "transformer", reference.tensors(), config))
    recipe = Recipe(source, sana(), torch.device("cpu"), torch.float32, precision=precision)
    program = compile_network(recipe, ONE)
    args = inputs(SHAPES[-1], config)
    assert relative(run_step(program.network, args, 0), reference.velocity(*args, 1.0, 0.0)) < bar


def test_several_steps_cannot_be_absorbed():
    with pytest.raises(ConfigError, match="constants of 4 steps cannot be absorbed"):
        SanaTransformer(SMALL, folded_steps=4, absorbed=True)


@CONFIGS
def test_bfloat16_is_at_least_as_exact_as_diffusers(config):
    """RMS error against float32 on the same bf16 weights and inputs; diffusers rounds more often. The
    ratio's geometric mean over networks and inputs: now and then a query's divisor in linear attention
    is next to nothing, and one such outlier would decide a common sum."""
    ratios = []
    for seed in range(4):
        peer = TwinFlowReference(config, seed).bfloat16()
        half = peer.tensors()
        exact = ours({k: v.float() for k, v in half.items()}, config)
        unfolded, tables = ours(half, config), folded(half, config, ONE)
        inside = folded(half, config, ONE, absorbed=True)
        for shape in SHAPES:
            args = inputs(shape, dtype=torch.bfloat16)
            truth = run(exact, (args[0].float(), args[1].float(), args[2]), 1.0, 0.0)
            outs = (
                run(unfolded, args, 1.0, 0.0), run_step(tables, args, 0), run_step(inside, args, 0),
                peer.velocity(*args, 1.0, 0.0),
            )  # fmt: skip
            assert all(out.dtype == torch.bfloat16 for out in outs)
            errors = torch.stack([(out.double() - truth).square().mean().sqrt() for out in outs])
            ratios.append(errors[:3] / errors[3])
    assert torch.stack(ratios).log().mean(0).exp().max() <= 1


def test_each_sample_has_its_own_time_and_prompt(references):
    """A batch equals its samples run alone: ragged prompts, different (t, tt), padding of any value."""
    network, (latents, embeds, lengths) = ours(references[SMALL].tensors()), inputs(SHAPES[-1])
    t, tt = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.0, 0.7, 0.1])
    for i, n in enumerate(lengths):
        embeds[i, n:] = float("nan")
    with torch.no_grad():
        out = network(latents, network.modulate(t, tt), network.encode_context(embeds, lengths))
        for i, n in enumerate(lengths):
            one = slice(i, i + 1)
            context = network.encode_context(embeds[one], (n,))
            assert relative(out[one], network(latents[one], network.modulate(t[one], tt[one]), context)) < 1e-5


def test_masks_only_ragged_prompts(references):
    network, seen = ours(references[SMALL].tensors()), []

    def attention(q, k, v, lengths=None):
        seen.append((q.shape[1], k.shape[1], None if lengths is None else lengths.tolist()))
        return eager.attention(q, k, v, lengths)

    eager = network.ops
    network.ops = replace(eager, attention=attention)
    for shape in ((4, 6, (5, 5)), (4, 6, (2, 5))):
        run(network, inputs(shape), 1.0, 0.0)
    assert seen == [(24, 5, None)] * 3 + [(24, 5, [2, 5])] * 3


def test_linear_attention_is_its_quadratic_form():
    """relu(q) relu(k)^T, its rows divided by their sums, times v: in float64, per head; 0 for dead queries."""
    q, k, v = torch.randn(3, 2, 37, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q[0, 3] = -1
    scores = torch.einsum("bshd,bthd->bhst", q.relu(), k.relu())
    weights = scores / scores.sum(-1, keepdim=True).clamp(min=1e-15)
    expected = torch.einsum("bhst,bthd->bshd", weights, v).flatten(2)
    out = linear_attention(q.float(), k.float(), v.float())
    assert out.dtype == torch.float32 and relative(out, expected) < 1e-6
    assert not out[0, 3].any()
    half = linear_attention(*(x.bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16 and relative(half, expected) < 2e-2


def test_forward_never_asks_for_a_value():
    """On the meta device tensors have none, so any synchronisation would raise."""
    with torch.device("meta"):
        network = SanaTransformer(SMALL, folded_steps=2)
        context = network.encode_context(torch.empty(3, 9, 20), (9, 4, 1))
        out = network(torch.empty(3, 4, 6, 10), network.step_modulation(1), context)
    assert out.is_meta and out.shape == (3, 4, 6, 10)


@CONFIGS
def test_merge_and_split_are_inverse(references, config):
    tensors = references[config].tensors()
    merged = merge(tensors, FUSED)
    assert merged.keys() == SanaTransformer(config).state_dict().keys()
    back = split(merged, FUSED)
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], v) for k, v in tensors.items())


def test_sprints_flow_is_linear():
    """cos(s) x + sin(s) z = ((1-t) x + t z) * (sin(s) + cos(s)) at t = sin(s) / (sin(s) + cos(s)), and the
    published step, which forms a TrigFlow velocity of the network's F and takes x from that, is x_t - t F."""
    x, z, flow = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for s in (0.3, 1.1, 1.3, math.pi / 2):
        t, total = math.sin(s) / (math.sin(s) + math.cos(s)), math.sin(s) + math.cos(s)
        state, linear = math.cos(s) * x + math.sin(s) * z, (1 - t) * x + t * z
        assert relative(linear * total, state) < 1e-12
        norm = math.hypot(t, 1 - t)
        trig = ((1 - 2 * t) * linear + (1 - 2 * t + 2 * t * t) * flow) / norm
        assert relative(math.cos(s) * state - math.sin(s) * trig, linear - t * flow) < 1e-12


def test_full_size():
    """SANA 1.6B, and what folding leaves of it."""
    from diffusers import SanaTransformer2DModel

    def count(module):
        return sum(p.numel() for p in module.parameters())

    config = SanaConfig()
    with torch.device("meta"):
        full, tables = SanaTransformer(config), SanaTransformer(config, folded_steps=1)
        inside = SanaTransformer(config, folded_steps=1, absorbed=True)
        peer = SanaTransformer2DModel(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")})
    assert (count(peer), count(full.time_embed_2)) == (1_604_462_752, 35_714_560)
    assert count(full) == count(peer) + count(full.time_embed_2)
    assert count(tables) == 1_568_474_912
    assert sum(folded_away(full, tables).values()) == count(full) - count(tables)
    # absorbed shifts give the attention's input projections a bias, and nothing else
    assert count(inside) - count(tables) == 20 * 3 * 2240
    assert sum(b.numel() for b in tables.buffers()) == (20 * 6 + 2) * 2240 and not list(inside.buffers())


def test_config_round_trips_and_reads_the_released_file():
    released = {
        "_class_name": "SanaTransformer2DModel", "_diffusers_version": "0.32.0.dev0", "attention_bias": False,
        "attention_head_dim": 32, "caption_channels": 2304, "cross_attention_dim": 2240,
        "cross_attention_head_dim": 112, "dropout": 0.0, "in_channels": 32, "interpolation_scale": None,
        "mlp_ratio": 2.5, "norm_elementwise_affine": False, "norm_eps": 1e-06, "num_attention_heads": 70,
        "num_cross_attention_heads": 20, "num_layers": 20, "out_channels": 32, "patch_size": 1, "sample_size": 32,
    }  # fmt: skip
    assert SanaConfig.from_dict(released) == SanaConfig()
    assert SanaConfig.from_dict({**released, "out_channels": None, "timestep_scale": 1.0}) == SanaConfig()
    assert SanaConfig.from_dict(SPRINT.to_dict()) == SPRINT


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"patch_size": 2}, "patch_size is 2, only 1 is supported"),
        ({"interpolation_scale": 2.0}, "interpolation_scale is 2.0, only None"),
        ({"cross_attention_dim": 24}, "cross_attention_dim is 24, only 12"),
        ({"out_channels": 8}, "out_channels is 8, only 4"),
        ({"qk_norm": "rms_norm"}, "qk_norm 'rms_norm' is not supported"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dim": 3840}, r"does not know: \['dim'\]"),
    ],
)
def test_other_configs_are_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        SanaConfig.from_dict({**SMALL.to_dict(), **change})


@settings(max_examples=8, deadline=None)
@given(
    heads=st.integers(1, 3), head_dim=st.integers(1, 4), cross=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    layers=st.integers(1, 3), channels=st.integers(1, 3), ratio=st.sampled_from([1.0, 2.5]), sprint=st.booleans(),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    t=st.floats(-1, 1), tt=st.floats(-1, 1),
)  # fmt: skip
def test_any_network_equals_diffusers(heads, head_dim, cross, layers, channels, ratio, sprint, size, lengths, t, tt):
    config = SanaConfig(
        in_channels=channels, out_channels=channels, num_attention_heads=heads, attention_head_dim=head_dim,
        num_layers=layers, num_cross_attention_heads=cross[0], cross_attention_head_dim=cross[1],
        cross_attention_dim=heads * head_dim, caption_channels=5, mlp_ratio=ratio, sample_size=2,
        guidance_embeds=sprint, qk_norm="rms_norm_across_heads" if sprint else None,
    )  # fmt: skip
    if config.dim == 1:  # LayerNorm of one feature is 0 whatever it is
        return
    reference = TwinFlowReference(config, seed=layers)
    t, tt = (torch.tensor(v).item() for v in (t, tt))  # as float32 holds them
    args = inputs((*size, tuple(lengths)), config)
    exact = TwinFlowReference(config, seed=layers).double()
    expected, tensors = reference.velocity(*args, t, tt), reference.tensors()
    # tiny widths make norms ill-conditioned: what float32 itself loses there is no error of ours
    lost = relative(expected, exact.velocity(args[0].double(), args[1].double(), args[2], t, tt))
    bar = max(1e-5, 2 * lost)
    assert relative(run(ours(tensors, config), args, t, tt), expected) < bar
    for absorbed in (False, True):
        network = folded(tensors, config, ((t, tt),), absorbed)
        assert relative(run_step(network, args, 0), expected) < bar
