"""Merged projections and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinflow_rt.errors import CheckpointError
from twinflow_rt.passes.fuse import merge, sources, split, stack

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
