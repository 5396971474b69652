"""Every family's velocity network against diffusers', and against TwinFlow's formula for its second embedder."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import qwen_image_factory, sana_factory, sd3_factory, z_image_factory
from tests.networks import (
    FOUR,
    ONE,
    Inputs,
    context_of,
    family,
    folded,
    inputs,
    merge,
    ours,
    relative,
    run,
    run_step,
    save,
)
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.fuse import split
from twinflow_rt.checkpoint.reading import materialize
from twinflow_rt.compile import Recipe, compile_network
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.models.layers import IDENTITY

CPU = torch.device("cpu")
TIMES = [(1.0, 0.0), (0.6, 0.25), (0.5, 0.5), (-0.75, -0.5)]
CASES = {
    "z-image": (z_image_factory, z_image_factory.SMALL), "qwen-image": (qwen_image_factory, qwen_image_factory.SMALL),
    "sd3": (sd3_factory, sd3_factory.SMALL), "sana": (sana_factory, sana_factory.SMALL),
    "sprint": (sana_factory, sana_factory.SPRINT),
}  # fmt: skip
SANA = {
    "num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128, "cross_attention_head_dim": 64,
    "caption_channels": 96,
}  # fmt: skip
SD3 = {
    "attention_head_dim": 64, "caption_projection_dim": 128, "pooled_projection_dim": 96, "joint_attention_dim": 96
}  # fmt: skip
WIDE = {"sd3": SD3, "sana": SANA, "sprint": SANA}  # enough for packed and quantized layers; modulation's stay plain


class Case:
    """A family's tiny network, diffusers' beside it."""

    def __init__(self, name: str) -> None:
        self.name, (self.factory, self.config) = name, CASES[name]
        self.reference = self.factory.TwinFlowReference(self.config)
        self.tensors, self.network = self.reference.tensors(), ours(self.reference.tensors(), self.config)
        self.inputs = [inputs(shape, self.config) for shape in self.factory.SHAPES]
        self.build = family(self.config).network


@pytest.fixture(scope="module")
def cases():
    return {}


@pytest.fixture
def case(request, cases):
    """Of the family that the test names; made once."""
    if request.param not in cases:
        cases[request.param] = Case(request.param)
    return cases[request.param]


def some(*names):
    return pytest.mark.parametrize("case", names, indirect=True)


ALL = some(*CASES)


@ALL
@pytest.mark.parametrize("t", [1.0, 0.37])
def test_equals_diffusers_where_the_second_embedder_is_silent(case, t):
    """At (t, t), whatever it holds; and anywhere where it holds zeros."""
    second = f"{case.reference.prefix}."
    zero = {k: v * 0 if k.startswith(second) else v for k, v in case.tensors.items()}
    for args in case.inputs:
        expected = case.reference.velocity(args, t)
        assert relative(run(case.network, args, t, t), expected) < 1e-5
        assert relative(run(ours(zero, case.config), args, t, 0.0), expected) < 1e-5


@ALL
@pytest.mark.parametrize("times", TIMES)
def test_equals_diffusers_with_twinflows_formula(case, times):
    for args in case.inputs:
        expected = case.reference.velocity(args, *times)
        assert relative(run(case.network, args, *times), expected) < 1e-5
        # the second embedder is really there: leaving it out is another function, but for Z-Image's at one step
        without = relative(case.reference.velocity(args, times[0]), expected)
        if case.reference.second is None or times[0] == times[1] > 0 or (case.name, times) == ("z-image", TIMES[0]):
            assert without < 1e-5
        else:
            assert without > 1e-2


@ALL
@pytest.mark.parametrize("schedule", [ONE, FOUR])
def test_tables_equal_diffusers(case, schedule):
    network = folded(case.tensors, case.config, schedule)
    for args in case.inputs:
        for step, times in enumerate(schedule):
            assert relative(run_step(network, args, step), case.reference.velocity(args, *times)) < 1e-5


@some("qwen-image", "sana", "sprint")
@pytest.mark.parametrize("times", [(1.0, 0.0), (0.4, 0.1)])
def test_absorbed_equals_diffusers(case, times):
    network = folded(case.tensors, case.config, (times,), absorbed=True)
    assert not list(network.buffers())
    blocks = network.step_modulation(0).blocks
    assert all(constants in (IDENTITY, (IDENTITY, IDENTITY)) for constants in blocks)
    for args in case.inputs:
        assert relative(run_step(network, args, 0), case.reference.velocity(args, *times)) < 1e-5


@some("qwen-image", "sana")
def test_several_steps_cannot_be_absorbed(case):
    with pytest.raises(ConfigError, match="constants of 4 steps cannot be absorbed"):
        case.build(case.config, folded_steps=4, absorbed=True)


@some(*WIDE)
@pytest.mark.parametrize(("precision", "bar"), [(None, 1e-5), ("int8", 0.05)])
def test_compiles_wide_enough_for_packed_and_quantized_layers(case, tmp_path, precision, bar):
    config = replace(case.config, **WIDE[case.name])
    reference = case.factory.TwinFlowReference(config)
    source = Checkpoint(save(tmp_path / "transformer", reference.tensors(), config))
    program = compile_network(Recipe(source, family(config), CPU, torch.float32, precision=precision), ONE)
    args = inputs(case.factory.SHAPES[-1], config)
    assert relative(run_step(program.network, args, 0), reference.velocity(args, 1.0, 0.0)) < bar


@ALL
def test_bfloat16_is_at_least_as_exact_as_diffusers(case):
    """RMS errors against float32 on the same bf16 weights and inputs; diffusers rounds more often. Of SANA the
    geometric mean over networks and inputs: now and then a query's divisor in linear attention is next to nothing,
    and one such outlier would decide a common sum. Of SD3.5 their sum."""
    mean, ratios, squares = case.name in ("sana", "sprint"), [], 0
    for seed in range(4 if mean else 1):
        peer = case.factory.TwinFlowReference(case.config, seed if mean else 1).bfloat16()
        half = peer.tensors()
        exact, unfolded = ours({k: v.float() for k, v in half.items()}, case.config), ours(half, case.config)
        compiled = [folded(half, case.config, ONE)]
        if mean:
            compiled.append(folded(half, case.config, ONE, absorbed=True))
        for args in (args.to(torch.bfloat16) for args in case.inputs):
            truth = run(exact, args.to(torch.float32), 1.0, 0.0)
            outs = [run(unfolded, args, 1.0, 0.0), *(run_step(network, args, 0) for network in compiled)]
            outs.append(peer.velocity(args, 1.0, 0.0))
            assert all(out.dtype == torch.bfloat16 for out in outs)
            errors = torch.stack([(out.double() - truth).square().mean() for out in outs])
            ratios.append((errors[:-1] / errors[-1]).sqrt())
            squares = squares + errors
    if mean:
        assert torch.stack(ratios).log().mean(0).exp().max() <= 1
    elif case.name == "sd3":
        assert (squares[:-1].sqrt() <= 1.1 * squares[-1].sqrt()).all()
    else:
        assert max(ratio[0] for ratio in ratios) <= 1.1


@some("z-image", "qwen-image", "sana")
def test_each_sample_has_its_own_time_and_prompt(case):
    """A batch equals its samples run alone: ragged prompts, different (t, tt), NaN beyond each prompt's end."""
    args = copy.deepcopy(next(args for args in case.inputs if len(args.lengths) == 3))
    for row, n in zip(args.embeds, args.lengths, strict=True):
        row[n:] = float("nan")
    t, tt = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.0, 0.7, 0.1])
    whole = run(case.network, args, t, tt)
    for i in range(3):
        assert relative(whole[i : i + 1], run(case.network, args.one(i), t[i], tt[i])) < 1e-5


@pytest.mark.parametrize(
    ("case", "lengths", "expected"),
    [  # queries, keys, lengths of each attention
        # 6 image tokens and 5 prompt tokens; the last block asks for image tokens only
        ("qwen-image", (5, 5), [(11, 11, None), (11, 11, None), (6, 11, None)]),
        ("qwen-image", (2, 5), [(11, 11, [8, 11]), (11, 11, [8, 11]), (6, 11, [8, 11])]),
        # never masked; blocks 0 and 1 have a second attention of the image alone
        ("sd3", (5,), [(11, 11, None), (6, 6, None), (11, 11, None), (6, 6, None), (6, 11, None)]),
        # 24 image tokens
        ("sana", (5, 5), [(24, 5, None)] * 3),
        ("sana", (2, 5), [(24, 5, [2, 5])] * 3),
    ],
    indirect=["case"],
)
def test_masks_only_ragged_prompts_and_computes_no_unread_output(case, monkeypatch, lengths, expected):
    seen, eager = [], case.network.ops

    def attention(q, k, v, lengths=None):
        seen.append((q.shape[1], k.shape[1], None if lengths is None else lengths.tolist()))
        return eager.attention(q, k, v, lengths)

    monkeypatch.setattr(case.network, "ops", replace(eager, attention=attention))
    run(case.network, inputs((4, 6, lengths), case.config), 1.0, 0.0)
    assert seen == expected


@some("qwen-image", "sd3", "sana")
def test_forward_never_asks_for_a_value(case):
    """On the meta device tensors have none, so any synchronisation would raise."""
    lengths = (9, 9, 9) if case.name == "sd3" else (9, 4, 1)
    with torch.device("meta"):
        network = case.build(case.config, folded_steps=2)
        latents, embeds, _, extras = inputs((6, 10, lengths), case.config)
        args = Inputs(latents.to("meta"), embeds.to("meta"), lengths, {k: v.to("meta") for k, v in extras.items()})
        out = network(args.latents, network.step_modulation(1), context_of(network, args))
    assert out.is_meta and out.shape == (3, 4, 6, 10)


@ALL
def test_merge_and_split_are_inverse(case):
    fused = family(case.config).layout.fused
    merged = merge(case.tensors, fused)
    assert merged.keys() == case.build(case.config).state_dict().keys()
    back = split(merged, fused)
    assert back.keys() == case.tensors.keys() and all(torch.equal(back[k], v) for k, v in case.tensors.items())


@some("qwen-image")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_a_checkpoint_folder(case, tmp_path, dtype):
    """Norm weights stay float32."""
    checkpoint = Checkpoint(save(tmp_path / "transformer", case.tensors, case.config))
    with torch.device("meta"):
        loaded = case.build(type(case.config).from_dict(checkpoint.config))
    materialize(loaded, checkpoint, family(case.config).layout, CPU, dtype)
    expected = case.network.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    if dtype == torch.float32:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
        args = case.inputs[0]
        assert relative(run(loaded, args, 1.0, 0.0), run(case.network, args, 1.0, 0.0)) < 1e-5
    else:
        wide = {n.rpartition(".")[0].split(".")[-1] for n, p in loaded.named_parameters() if p.dtype == torch.float32}
        assert wide == {"norm_q", "norm_k", "norm_added_q", "norm_added_k", "txt_norm"}


@some("qwen-image")
def test_a_checkpoint_without_the_second_embedder_is_refused(case, tmp_path):
    checkpoint = Checkpoint(save(tmp_path / "transformer", case.reference.network.state_dict(), case.config))
    with torch.device("meta"):
        network = case.build(case.config)
    with pytest.raises(CheckpointError, match="time_text_embed_2 is missing, though"):
        materialize(network, checkpoint, family(case.config).layout, CPU, torch.float32)


RELEASED = {
    "qwen-image": {
        "_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.34.0.dev0",
        "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": False,
        "in_channels": 64, "joint_attention_dim": 3584, "num_attention_heads": 24, "num_layers": 60,
        "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 768,
    },
    "sd3": {
        "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.31.0.dev0", "attention_head_dim": 64,
        "caption_projection_dim": 1536, "dual_attention_layers": list(range(13)), "in_channels": 16,
        "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "sample_size": 128,
    },
    "sana": {
        "_class_name": "SanaTransformer2DModel", "_diffusers_version": "0.32.0.dev0", "attention_bias": False,
        "attention_head_dim": 32, "caption_channels": 2304, "cross_attention_dim": 2240,
        "cross_attention_head_dim": 112, "dropout": 0.0, "in_channels": 32, "interpolation_scale": None,
        "mlp_ratio": 2.5, "norm_elementwise_affine": False, "norm_eps": 1e-06, "num_attention_heads": 70,
        "num_cross_attention_heads": 20, "num_layers": 20, "out_channels": 32, "patch_size": 1, "sample_size": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_config_round_trips_and_reads_the_released_file(name):
    config = CASES[name][1]
    kind = type(config)
    assert kind.from_dict(config.to_dict()) == config
    if name in RELEASED:
        assert kind.from_dict(RELEASED[name]) == kind()
    if name == "sana":
        assert kind.from_dict({**RELEASED[name], "out_channels": None, "timestep_scale": 1.0}) == kind()


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("z-image", {"axes_dims": [8, 8, 16]}, "add up"),
        ("z-image", {"n_kv_heads": 1}, "n_kv_heads"),
        ("z-image", {"all_patch_size": [4]}, "patch sizes"),
        ("z-image", {"joint_attention_dim": 3}, "does not know"),
        ("qwen-image", {"zero_cond_t": True}, "zero_cond_t: a variant"),
        ("qwen-image", {"patch_size": 1}, "packs latents 2x2"),
        ("qwen-image", {"out_channels": 64}, r"in_channels = 4 \* out_channels"),
        ("qwen-image", {"axes_dims_rope": [16, 56, 48]}, "add up to attention_head_dim = 24"),
        ("qwen-image", {"num_layers": 0}, "num_layers is 0"),
        ("qwen-image", {"dim": 3840}, r"does not know: \['dim'\]"),
        ("sd3", {"qk_norm": None}, "SD3 does not and is not supported"),
        ("sd3", {"patch_size": 4}, "patches of 2"),
        ("sd3", {"out_channels": 8}, "as many channels out as in"),
        ("sd3", {"caption_projection_dim": 24}, "must equal num_attention_heads"),
        ("sd3", {"dual_attention_layers": [1, 3]}, r"dual_attention_layers \[3\] are not among the 3 layers"),
        ("sd3", {"dim": 3840}, r"does not know: \['dim'\]"),
        ("sana", {"patch_size": 2}, "patch_size is 2, only 1 is supported"),
        ("sana", {"interpolation_scale": 2.0}, "interpolation_scale is 2.0, only None"),
        ("sana", {"cross_attention_dim": 24}, "cross_attention_dim is 24, only 12"),
        ("sana", {"out_channels": 8}, "out_channels is 8, only 4"),
        ("sana", {"qk_norm": "rms_norm"}, "qk_norm 'rms_norm' is not supported"),
        ("sana", {"num_layers": 0}, "num_layers is 0"),
        ("sana", {"dim": 3840}, r"does not know: \['dim'\]"),
    ],
)
def test_other_configs_are_refused(name, change, match):
    config = CASES[name][1]
    with pytest.raises(ConfigError, match=match):
        type(config).from_dict({**config.to_dict(), **change})


@pytest.mark.parametrize("name", ["z-image", "qwen-image", "sd3", "sana"])
@settings(max_examples=8, deadline=None)
@given(
    data=st.data(), size=st.tuples(*[st.integers(1, 5)] * 2), t=st.floats(-1, 1), tt=st.floats(-1, 1),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)  # fmt: skip
def test_any_network_equals_diffusers(name, data, size, t, tt, lengths):
    factory, patch = CASES[name][0], 1 if name == "sana" else 2
    config = data.draw(factory.configs())
    reference = factory.TwinFlowReference(config, seed=3)
    t, tt = (torch.tensor(v).item() for v in (t, tt))  # as float32 holds them
    lengths = (lengths[0],) * len(lengths) if name == "sd3" else tuple(lengths)
    args = inputs((patch * size[0], patch * size[1], lengths), config)
    expected, tensors = reference.velocity(args, t, tt), reference.tensors()
    bar = 3e-5 if name == "sd3" else 1e-5  # SD3.5's norm over as few as four values amplifies rounding
    if name == "sana":  # tiny widths make norms ill-conditioned: what float32 itself loses there is no error of ours
        exact = copy.deepcopy(reference).double().velocity(args.to(torch.float64), t, tt)
        bar = max(bar, 2 * relative(expected, exact))
    assert relative(run(ours(tensors, config), args, t, tt), expected) < bar
    for absorbed in (False, True) if name == "sana" else (False,):
        network = folded(tensors, config, ((t, tt),), absorbed)
        assert relative(run_step(network, args, 0), expected) < bar


def test_qwen_images_time_embedding_follows_the_formula_in_float64():
    """temb = e1(t) + (t - tt) e2(tt), e = W2 silu(W1 [cos, sin](1000 t f) + b1) + b2, f = 10000^(-i/128)."""
    tensors = qwen_image_factory.TwinFlowReference().tensors()
    weights = {k: v.double() for k, v in tensors.items() if k.startswith("time_text")}
    t, tt = torch.tensor([0.5, 0.125, 1.0]), torch.tensor([0.25, 0.125, 0.0])

    def embed(prefix, t):
        angles = 1000 * t.double()[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
        x = torch.cat((angles.cos(), angles.sin()), 1)
        for i, act in ((1, torch.nn.functional.silu), (2, lambda x: x)):
            at = f"{prefix}.timestep_embedder.linear_{i}."
            x = act(x @ weights[at + "weight"].T + weights[at + "bias"])
        return x

    expected = embed("time_text_embed", t) + (t - tt).double()[:, None] * embed("time_text_embed_2", tt)
    with torch.no_grad():
        # phases of up to 1000 rad are float32, resolved to 6e-5
        assert relative(ours(tensors, qwen_image_factory.SMALL).embed_time(t, tt), expected) < 1e-4


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_plain_network_is_diffusers_own(case):
    """Without the second embedder, unfolded, as tables and absorbed; no target time but t itself."""
    if case.reference.second is None:
        return
    config = replace(case.config, twinflow=False)
    tensors = {k: v for k, v in case.tensors.items() if not k.startswith(case.reference.prefix)}
    args, times = case.inputs[0], ((0.9, 0.9), (0.4, 0.4))
    plain, tables = ours(tensors, config), folded(tensors, config, times)
    assert config.to_dict()["twinflow"] is False and "twinflow" not in case.config.to_dict()
    for step, (t, tt) in enumerate(times):
        expected = case.reference.velocity(args, t)
        assert relative(run(plain, args, t, tt), expected) < 1e-5
        assert relative(run_step(tables, args, step), expected) < 1e-5
    if hasattr(case.build, "absorptions"):
        absorbed = folded(tensors, config, times[:1], absorbed=True)
        assert relative(run_step(absorbed, args, 0), case.reference.velocity(args, 0.9)) < 1e-5
    with pytest.raises(ConfigError, match="second time embedder"):
        run(plain, args, 1.0, 0.0)
