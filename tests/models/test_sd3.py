"""SD3.5 against diffusers' network, and against TwinFlow's formula for its second embedder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.qwen_image_factory import relative, save
from tests.sd3_factory import (
    SHAPES,
    SMALL,
    TwinFlowReference,
    context_of,
    inputs,
    ours,
    run,
    run_step,
)
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.fuse import merge, split
from twinflow_rt.compile import Recipe, compile_network
from twinflow_rt.errors import ConfigError
from twinflow_rt.families import sd3
from twinflow_rt.models.transformers.sd3 import FUSED, SD3Config, SD3Transformer
from twinflow_rt.passes.fold import fold, folded_away

ONE, FOUR = ((1.0, 0.0),), ((0.999, 0.0), (0.75, 0.0), (0.5, 0.5), (0.25, 0.1))


@pytest.fixture(scope="module")
def reference():
    return TwinFlowReference()


@pytest.fixture(scope="module")
def network(reference):
    return ours(reference.tensors())


def folded(tensors, config, schedule):
    weights = merge(tensors, FUSED)
    with torch.device("meta"):
        shell = SD3Transformer(config)
    weights |= fold(shell, weights.__getitem__, schedule)
    network = SD3Transformer(config, folded_steps=len(schedule))
    network.load_state_dict({k: weights[k] for k in network.state_dict()}, assign=True)
    return network.eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [1.0, 0.37])
def test_equals_diffusers_where_the_second_embedder_is_silent(reference, network, shape, t):
    args = inputs(shape)
    assert relative(run(network, args, t, t), reference.velocity(*args, t)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("times", [(1.0, 0.0), (0.6, 0.25), (-0.75, -0.5)])
def test_equals_diffusers_with_twinflows_formula(reference, network, shape, times):
    args = inputs(shape)
    expected = reference.velocity(*args, *times)
    assert relative(run(network, args, *times), expected) < 1e-5
    # the second embedder is really there: leaving it out is another function
    assert relative(reference.velocity(*args, times[0]), expected) > 1e-2


@pytest.mark.parametrize("schedule", [ONE, FOUR])
def test_folded_equals_diffusers(reference, schedule):
    network = folded(reference.tensors(), SMALL, schedule)
    for shape in SHAPES:
        args = inputs(shape)
        for step, times in enumerate(schedule):
            assert relative(run_step(network, args, step), reference.velocity(*args, *times)) < 1e-5


@pytest.mark.parametrize(("precision", "bar"), [(None, 1e-5), ("int8", 0.05)])
def test_compiles_wide_enough_for_packed_and_quantized_layers(tmp_path, precision, bar):
    """Layers of 32 and more take other forms on a CPU; those that make modulation stay plain."""
    config = replace(
        SMALL, attention_head_dim=64, caption_projection_dim=128, pooled_projection_dim=96, joint_attention_dim=96
    )
    reference = TwinFlowReference(config)
    source = Checkpoint(save(tmp_path / "transformer", reference.tensors(), config))
    recipe = Recipe(source, sd3(), torch.device("cpu"), torch.float32, precision=precision)
    program = compile_network(recipe, ONE)
    args = inputs(SHAPES[2], config)
    assert relative(run_step(program.network, args, 0), reference.velocity(*args, 1.0, 0.0)) < bar


def test_a_context_holds_all_that_its_prompt_modulates(reference):
    """One row of constants per prompt and evaluation; images of a prompt share them."""
    network, (latents, embeds, pooled) = folded(reference.tensors(), SMALL, FOUR), inputs(SHAPES[2])
    with torch.no_grad():
        context = context_of(network, (latents, embeds, pooled))
        # blocks 0 and 1: 9 + 6 rows, the last: 6 + 2, the closing norm: 2
        assert context.constants.shape == (3, 4, 2 * (9 + 6) + 6 + 2 + 2, SMALL.dim)
        assert context.constants.dtype == torch.float32
        images = torch.cat((latents, latents))
        out = network(images, network.step_modulation(2), context.select([0, 1, 2, 2, 0, 1]))
        for image, prompt in ((3, 2), (5, 1)):
            alone = context_of(network, (None, embeds[prompt, None], pooled[prompt, None]))
            assert relative(out[image, None], network(images[image, None], 2, alone)) < 1e-5


def test_the_last_block_computes_no_prompt_output(network):
    seen, eager = [], network.ops

    class Spy:
        def __getattr__(self, name):
            return getattr(eager, name)

        def attention(self, q, k, v, lengths=None):
            seen.append((q.shape[1], k.shape[1], lengths))
            return eager.attention(q, k, v, lengths)

    network.ops = Spy()
    try:
        run(network, inputs((4, 6, 1, 5)), 1.0, 0.0)
    finally:
        network.ops = eager
    # 6 image and 5 prompt tokens, never masked; blocks 0 and 1 have a second attention of the image alone
    assert seen == [(11, 11, None), (6, 6, None), (11, 11, None), (6, 6, None), (6, 11, None)]


def test_positions_are_those_of_the_middle(reference, network):
    """Latents of 4x6 get rows 3..4, columns 3..5 of a 9x9 table, which is read from the checkpoint."""
    table = reference.network.pos_embed.pos_embed.view(9, 9, -1)
    with torch.no_grad():
        tokens = network.pos_embed(torch.zeros(1, 4, 4, 6)) - network.pos_embed.proj.bias
    assert relative(tokens.view(2, 3, -1), table[3:5, 3:6]) < 1e-6
    with pytest.raises(ConfigError, match="latents of 20x4 exceed the 18"):
        network.pos_embed(torch.zeros(1, 4, 20, 4))


def test_prompts_of_several_lengths_are_refused(network):
    with pytest.raises(ConfigError, match=r"lengths \(5, 4\) in embeddings of 5 rows"):
        network.encode_context(torch.zeros(2, 5, 20), (5, 4), pooled=torch.zeros(2, 10))


def test_bfloat16_is_at_least_as_exact_as_diffusers():
    """RMS error against float32 on the same bf16 weights and inputs; diffusers rounds more often."""
    peer = TwinFlowReference().bfloat16()
    half = peer.tensors()
    wide = {k: v.float() for k, v in half.items()}
    exact, rounded, tables = ours(wide), ours(half), folded(half, SMALL, ONE)
    errors = torch.zeros(3, dtype=torch.float64)
    for shape in SHAPES:
        args = inputs(shape, dtype=torch.bfloat16)
        truth = run(exact, [a.float() for a in args], 1.0, 0.0)
        outs = run(rounded, args, 1.0, 0.0), run_step(tables, args, 0), peer.velocity(*args, 1.0, 0.0)
        assert all(out.dtype == torch.bfloat16 for out in outs)
        errors += torch.stack([(out.double() - truth).square().mean() for out in outs])
    unfolded, tables, diffusers = errors.sqrt().tolist()
    assert unfolded <= 1.1 * diffusers and tables <= 1.1 * diffusers


def test_forward_never_asks_for_a_value():
    """On the meta device tensors have none, so any synchronisation would raise."""
    with torch.device("meta"):
        network = SD3Transformer(SMALL, folded_steps=2)
        context = network.encode_context(torch.empty(3, 9, 20), (9, 9, 9), pooled=torch.empty(3, 10))
        out = network(torch.empty(3, 4, 6, 10), network.step_modulation(1), context)
    assert out.is_meta and out.shape == (3, 4, 6, 10)


def test_merge_and_split_are_inverse(reference):
    tensors = reference.tensors()
    merged = merge(tensors, FUSED)
    assert merged.keys() == SD3Transformer(SMALL).state_dict().keys()
    back = split(merged, FUSED)
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], v) for k, v in tensors.items())


def test_full_size():
    """SD3.5 Medium is published with 2.24 billion parameters; positions are a table beside them."""
    from diffusers import SD3Transformer2DModel

    def count(module):
        return sum(p.numel() for p in module.parameters())

    config = SD3Config()
    with torch.device("meta"):
        full, tables = SD3Transformer(config), SD3Transformer(config, folded_steps=1)
        peer = SD3Transformer2DModel(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")})
    second = count(full.time_text_embed_2)
    assert (count(peer), second) == (2_243_171_520, 8_263_680)
    assert count(full) == count(peer) + second
    # folding leaves out two time MLPs; 767 million parameters of modulation run once per prompt
    assert sum(folded_away(full, tables).values()) == count(full) - count(tables) == 2 * 2_755_584
    prompt = sum(count(tables.get_submodule(name)) for name in tables.prompt_modules if "norm" in name)
    assert prompt == 767_270_400
    assert full.pos_embed.pos_embed.numel() == 384**2 * 1536


def test_config_round_trips_and_reads_the_released_file():
    released = {
        "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.31.0.dev0", "attention_head_dim": 64,
        "caption_projection_dim": 1536, "dual_attention_layers": list(range(13)), "in_channels": 16,
        "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "sample_size": 128,
    }  # fmt: skip
    assert SD3Config.from_dict(released) == SD3Config()
    assert SD3Config.from_dict(SMALL.to_dict()) == SMALL


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"qk_norm": None}, "SD3 does not and is not supported"),
        ({"patch_size": 4}, "patches of 2"),
        ({"out_channels": 8}, "as many channels out as in"),
        ({"caption_projection_dim": 24}, "must equal num_attention_heads"),
        ({"dual_attention_layers": [1, 3]}, r"dual_attention_layers \[3\] are not among the 3 layers"),
        ({"dim": 3840}, r"does not know: \['dim'\]"),
    ],
)
def test_other_configs_are_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        SD3Config.from_dict({**SMALL.to_dict(), **change})


@settings(max_examples=8, deadline=None)
@given(
    heads=st.integers(1, 3), half=st.integers(1, 4), layers=st.integers(1, 3), channels=st.integers(1, 3),
    height=st.integers(1, 5), width=st.integers(1, 5), batch=st.integers(1, 3), tokens=st.integers(1, 6),
    t=st.floats(-1, 1), tt=st.floats(-1, 1), data=st.data(),
)  # fmt: skip
def test_any_network_equals_diffusers(heads, half, layers, channels, height, width, batch, tokens, t, tt, data):
    dual = data.draw(st.sets(st.integers(0, layers - 1)))
    config = SD3Config(
        sample_size=8, in_channels=channels, out_channels=channels, num_layers=layers, attention_head_dim=2 * half,
        num_attention_heads=heads, joint_attention_dim=5, caption_projection_dim=2 * half * heads,
        pooled_projection_dim=3, pos_embed_max_size=5, dual_attention_layers=tuple(dual),
    )  # fmt: skip
    if config.dim % 4:  # diffusers' own positions need it
        return
    reference = TwinFlowReference(config, seed=layers)
    t, tt = (torch.tensor(v).item() for v in (t, tt))  # as float32 holds them
    args = inputs((2 * height, 2 * width, batch, tokens), config)
    expected = reference.velocity(*args, t, tt)
    bound = 3e-5  # not 1e-5: a norm over as few as four values amplifies rounding
    assert relative(run(ours(reference.tensors(), config), args, t, tt), expected) < bound
    assert relative(run_step(folded(reference.tensors(), config, ((t, tt),)), args, 0), expected) < bound
