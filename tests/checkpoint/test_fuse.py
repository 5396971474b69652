"""Merged projections and back; and how few launches are left of a block."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.factory import TRANSFORMER
from tests.networks import merge
from tests.qwen_image_factory import SMALL
from twinflow_rt.checkpoint.fuse import sources, split, stack
from twinflow_rt.errors import CheckpointError
from twinflow_rt.models.transformers.qwen_image import QwenImageTransformer
from twinflow_rt.models.transformers.z_image import ZImageConfig, ZImageTransformer
from twinflow_rt.ops import EAGER, OpTable

FUSED = {"qkv.weight": ("q.weight", "k.weight", "v.weight")}


def test_sources_match_whole_names_only():
    assert sources("a.0.qkv.weight", FUSED) == ("a.0.q.weight", "a.0.k.weight", "a.0.v.weight")
    assert sources("qkv.weight", FUSED) == FUSED["qkv.weight"]
    assert sources("a.notqkv.weight", FUSED) == ("a.notqkv.weight",)


@given(blocks=st.integers(0, 3), rows=st.integers(1, 5))
def test_split_undoes_merge(blocks, rows):
    names = [f"b.{i}.{p}" for i in range(blocks) for p in FUSED["qkv.weight"]]
    parts = {name: torch.randn(rows, 4) for name in names} | {"b.notq.weight": torch.randn(3, 3)}
    merged = merge(parts, FUSED)
    assert len(merged) == blocks + 1
    for i in range(blocks):
        expected = torch.cat([parts[f"b.{i}.{p}"] for p in FUSED["qkv.weight"]])
        assert torch.equal(merged[f"b.{i}.qkv.weight"], expected)
    back = split(merged, FUSED)
    assert back.keys() == parts.keys() and all(torch.equal(back[k], parts[k]) for k in parts)


def test_uneven_parts_split_by_given_rows():
    tensor = torch.arange(8.0)[:, None]
    out = split({"a.qkv.weight": tensor}, FUSED, {"qkv.weight": (4, 2, 2)})
    assert [len(t) for t in out.values()] == [4, 2, 2] and torch.equal(torch.cat(list(out.values())), tensor)


def test_incomplete_or_indivisible_merges_are_refused():
    with pytest.raises(CheckpointError, match=r"missing a\.v\.weight"):
        merge({"a.q.weight": torch.ones(1, 1), "a.k.weight": torch.ones(1, 1)}, FUSED)
    with pytest.raises(CheckpointError, match="does not split"):
        split({"a.qkv.weight": torch.ones(4, 1)}, FUSED)
    with pytest.raises(CheckpointError, match="do not add up"):
        stack(iter([torch.ones(2, 3), torch.ones(2, 3)]), 6)


def test_stack_holds_one_part_at_a_time():
    """Each part is dead before the next one is asked for."""
    import weakref

    alive: list[weakref.ref] = []

    def parts():
        for i in range(3):
            assert all(ref() is None for ref in alive[:-1])
            part = torch.full((2, 2), float(i))
            alive.append(weakref.ref(part))
            yield part
            del part

    assert torch.equal(stack(parts(), 6), torch.arange(3.0).repeat_interleave(2)[:, None].expand(6, 2))


def launches(network, channels, width) -> Counter[str]:
    """Calls of ops and of linear layers in one velocity evaluation."""
    calls: Counter[str] = Counter()

    def spied(name, run):
        return lambda *args: calls.update([name]) or run(*args)

    network.ops = OpTable(**{f.name: spied(f.name, getattr(EAGER, f.name)) for f in fields(OpTable)})
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: calls.update(["linear"]))
    with torch.device("meta"):
        latents, embeds = torch.empty(1, channels, 8, 12), torch.empty(1, 9, width)
    context = network.encode_context(embeds, (9,))
    calls.clear()
    network(latents, network.step_modulation(0), context)
    return calls


def test_a_z_image_block_is_eight_ops():
    """Three linear layers and five ops, of which one is the fourth linear layer with its activation; every
    residual, gate and norm between branches is one op."""
    config = ZImageConfig.from_dict(TRANSFORMER)
    with torch.device("meta"):
        network = ZImageTransformer(config, folded_steps=1)
    blocks = config.n_layers + config.n_refiner_layers
    assert launches(network, config.in_channels, config.cap_feat_dim) == {
        "linear": 3 * blocks + 2, "qk_norm_rope": blocks, "attention": blocks, "linear_swiglu": blocks,
        "residual_norm": 2 * blocks, "rms_norm": 2, "layer_norm": 1,
    }  # fmt: skip


@pytest.mark.parametrize("absorbed", [False, True])
def test_a_qwen_image_block_is_fourteen_ops(absorbed):
    """Six linear layers and eight ops for two streams, two of them a linear layer with its activation; the last
    block drops the prompt's second half."""
    with torch.device("meta"):
        network = QwenImageTransformer(SMALL, folded_steps=1, absorbed=absorbed)
    blocks = SMALL.num_layers
    assert launches(network, SMALL.out_channels, SMALL.joint_attention_dim) == {
        "linear": 6 * blocks - 2 + 2, "joint_qk_norm_rope": blocks, "attention": blocks,
        "linear_gelu": 2 * blocks - 1, "residual_layer_norm": 2 * (2 * blocks - 1), "layer_norm": 2,
    }  # fmt: skip
