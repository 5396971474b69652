"""Qwen-Image against diffusers' network, and against TwinFlow's formula for its second embedder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.qwen_image_factory import (
    SHAPES,
    SMALL,
    TwinFlowReference,
    inputs,
    ours,
    relative,
    run,
    save,
)
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.fuse import merge, split
from twinflow_rt.checkpoint.reading import materialize
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.families import qwen_image
from twinflow_rt.models.layers import pack, unpack
from twinflow_rt.models.transformers.qwen_image import FUSED, QwenImageConfig, QwenImageTransformer


@pytest.fixture(scope="module")
def reference():
    return TwinFlowReference()


@pytest.fixture(scope="module")
def network(reference):
    return ours(reference.tensors())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [1.0, 0.37])
def test_equals_diffusers_where_the_second_embedder_is_silent(reference, network, shape, t):
    args = inputs(shape)
    assert relative(run(network, args, t, t), reference.velocity(*args, t)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("times", [(1.0, 0.0), (0.6, 0.25), (-0.75, -0.5)])
def test_equals_diffusers_with_twinflows_time_formula(reference, network, shape, times):
    args = inputs(shape)
    expected = reference.velocity(*args, *times)
    assert relative(run(network, args, *times), expected) < 1e-5
    # the second embedder is really there: leaving it out is another function
    assert relative(reference.velocity(*args, times[0]), expected) > 1e-2


def test_time_embedding_follows_the_formula_in_float64(reference, network):
    """temb = e1(t) + (t - tt) e2(tt), e = W2 silu(W1 [cos, sin](1000 t f) + b1) + b2, f = 10000^(-i/128)."""
    weights = {k: v.double() for k, v in reference.tensors().items() if k.startswith("time_text")}
    t, tt = torch.tensor([0.5, 0.125, 1.0]), torch.tensor([0.25, 0.125, 0.0])

    def embed(prefix, t):
        angles = 1000 * t.double()[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
        x = torch.cat((angles.cos(), angles.sin()), 1)
        for i, act in ((1, torch.nn.functional.silu), (2, lambda x: x)):
            at = f"{prefix}.timestep_embedder.linear_{i}."
            x = act(x @ weights[at + "weight"].T + weights[at + "bias"])
        return x

    gap = (t - tt).double()[:, None]
    expected = embed("time_text_embed", t) + gap * embed("time_text_embed_2", tt)
    with torch.no_grad():
        # phases of up to 1000 rad are float32, resolved to 6e-5
        assert relative(network.embed_time(t, tt), expected) < 1e-4


def test_each_sample_has_its_own_time_and_prompt(network):
    """A batch equals its samples run alone: ragged prompts, different (t, tt), padding of any value."""
    latents, embeds, lengths = inputs(SHAPES[-1])
    t, tt = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.0, 0.7, 0.1])
    for i, n in enumerate(lengths):
        embeds[i, n:] = float("nan")
    with torch.no_grad():
        out = network(latents, network.modulate(t, tt), network.encode_context(embeds, lengths))
        for i, n in enumerate(lengths):
            one = slice(i, i + 1)
            context = network.encode_context(embeds[one], (n,))
            assert relative(out[one], network(latents[one], network.modulate(t[one], tt[one]), context)) < 1e-5


def test_masks_only_ragged_prompts(network):
    seen = []

    def attention(q, k, v, lengths=None):
        seen.append((q.shape[1], None if lengths is None else lengths.tolist()))
        return eager.attention(q, k, v, lengths)

    eager = network.ops
    network.ops = replace(eager, attention=attention)
    try:
        for shape in ((4, 6, (5, 5)), (4, 6, (2, 5))):
            run(network, inputs(shape), 1.0, 0.0)
    finally:
        network.ops = eager
    # 6 image tokens and 5 prompt tokens; the last block asks for image tokens only
    assert seen == [(11, None), (11, None), (6, None), (11, [8, 11]), (11, [8, 11]), (6, [8, 11])]


def test_bfloat16_is_at_least_as_exact_as_diffusers(reference):
    """RMS error against float32 on the same bf16 weights and inputs; diffusers rounds more often."""
    half = {k: v.bfloat16() for k, v in reference.tensors().items()}
    exact, rounded = ours({k: v.float() for k, v in half.items()}), ours(half)
    peer = TwinFlowReference()
    peer.network.bfloat16().load_state_dict({k: half[k] for k in peer.network.state_dict()})
    for shape in SHAPES:
        args = inputs(shape, dtype=torch.bfloat16)
        truth = run(exact, (args[0].float(), args[1].float(), args[2]), 1.0, 1.0)
        error, bound = (
            (out.float() - truth).square().mean().sqrt()
            for out in (run(rounded, args, 1.0, 1.0), peer.velocity(*args, 1.0))
        )
        assert run(rounded, args, 1.0, 1.0).dtype == torch.bfloat16
        assert error <= 1.1 * bound


def test_forward_never_asks_for_a_value():
    """On the meta device tensors have none, so any synchronisation would raise."""
    with torch.device("meta"):
        network = QwenImageTransformer(SMALL, folded_steps=2)
        latents, embeds = torch.empty(3, 4, 6, 10), torch.empty(3, 9, 20)
        out = network(latents, network.step_modulation(1), network.encode_context(embeds, (9, 4, 1)))
    assert out.is_meta and out.shape == latents.shape


def test_reads_a_checkpoint_folder(reference, tmp_path, network):
    checkpoint = Checkpoint(save(tmp_path / "transformer", reference.tensors()))
    with torch.device("meta"):
        loaded = QwenImageTransformer(QwenImageConfig.from_dict(checkpoint.config))
    materialize(loaded, checkpoint, qwen_image().layout, torch.device("cpu"), torch.float32)
    expected = network.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    args = inputs(SHAPES[0])
    assert relative(run(loaded, args, 1.0, 0.0), run(network, args, 1.0, 0.0)) < 1e-5


def test_norm_weights_stay_float32(reference, tmp_path):
    checkpoint = Checkpoint(save(tmp_path / "transformer", reference.tensors()))
    with torch.device("meta"):
        loaded = QwenImageTransformer(SMALL)
    materialize(loaded, checkpoint, qwen_image().layout, torch.device("cpu"), torch.bfloat16)
    wide = {n.rpartition(".")[0].split(".")[-1] for n, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert wide == {"norm_q", "norm_k", "norm_added_q", "norm_added_k", "txt_norm"}


def test_a_checkpoint_without_the_second_embedder_is_refused(reference, tmp_path):
    checkpoint = Checkpoint(save(tmp_path / "transformer", reference.network.state_dict()))
    with torch.device("meta"):
        network = QwenImageTransformer(SMALL)
    with pytest.raises(CheckpointError, match="time_text_embed_2 is missing: this is a plain Qwen-Image"):
        materialize(network, checkpoint, qwen_image().layout, torch.device("cpu"), torch.float32)


def test_merge_and_split_are_inverse(reference):
    tensors = reference.tensors()
    merged = merge(tensors, FUSED)
    assert merged.keys() == QwenImageTransformer(SMALL).state_dict().keys()
    back = split(merged, FUSED)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], v) for k, v in tensors.items())


def test_packing_orders_features_channel_first():
    latents = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    # token (row 1, column 2), feature (channel 1, dy 1, dx 0)
    assert tokens[1, 1 * 3 + 2, 1 * 4 + 1 * 2 + 0] == latents[1, 1, 2 * 1 + 1, 2 * 2 + 0]
    assert torch.equal(unpack(tokens, 2, 3), latents)


def test_config_round_trips_and_reads_the_released_file():
    released = {
        "_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.34.0.dev0",
        "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": False,
        "in_channels": 64, "joint_attention_dim": 3584, "num_attention_heads": 24, "num_layers": 60,
        "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 768,
    }  # fmt: skip
    assert QwenImageConfig.from_dict(released) == QwenImageConfig()
    assert QwenImageConfig.from_dict(SMALL.to_dict()) == SMALL


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"zero_cond_t": True}, "zero_cond_t: a variant"),
        ({"patch_size": 1}, "packs latents 2x2"),
        ({"out_channels": 64}, r"in_channels = 4 \* out_channels"),
        ({"axes_dims_rope": [16, 56, 48]}, "add up to attention_head_dim = 24"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dim": 3840}, r"does not know: \['dim'\]"),
    ],
)
def test_other_configs_are_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        QwenImageConfig.from_dict({**SMALL.to_dict(), **change})


@settings(max_examples=12, deadline=None)
@given(
    heads=st.integers(1, 3), axes=st.tuples(*[st.integers(1, 3)] * 3), layers=st.integers(1, 3),
    channels=st.integers(1, 3), width=st.integers(1, 5), height=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), t=st.floats(-1, 1), tt=st.floats(-1, 1),
)  # fmt: skip
def test_any_network_equals_diffusers(heads, axes, layers, channels, width, height, lengths, t, tt):
    config = QwenImageConfig(
        in_channels=4 * channels, out_channels=channels, num_layers=layers, num_attention_heads=heads,
        attention_head_dim=2 * sum(axes), joint_attention_dim=5, axes_dims_rope=tuple(2 * a for a in axes),
    )  # fmt: skip
    reference = TwinFlowReference(config, seed=layers)
    t, tt = (torch.tensor(v).item() for v in (t, tt))  # as float32 holds them
    args = inputs((2 * height, 2 * width, tuple(lengths)), config)
    assert relative(run(ours(reference.tensors(), config), args, t, tt), reference.velocity(*args, t, tt)) < 1e-5
