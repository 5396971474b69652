"""What every family has in common, at the size of its release, on the meta device."""

from __future__ import annotations

import pytest
import torch

from twinflow_rt.errors import CheckpointError
from twinflow_rt.families import FAMILIES, family_of, must_equal
from twinflow_rt.models.context import Context


@pytest.mark.parametrize("name", FAMILIES)
def test_a_release_is_found_by_its_config_alone(name):
    """Defaults are a release, a config survives the round trip, and every parameter that folding leaves
    has the name the unfolded network gives it."""
    family = family_of({"_class_name": name})
    config = family.config()
    assert family.config.from_dict(config.to_dict()) == config and config.to_dict()["_class_name"] == name
    with torch.device("meta"):
        whole, folded = family.network(config), family.network(config, folded_steps=2)
    assert {n for n, _ in folded.named_parameters()} < {n for n, _ in whole.named_parameters()}
    assert sum(p.numel() for p in whole.parameters()) > 1e9
    assert all(folded.get_submodule(part) is not None for part in folded.prompt_modules)


def test_unknown_networks_and_mismatched_parts_are_named():
    with pytest.raises(CheckpointError, match="is none of the supported families: ZImage"):
        family_of({"_class_name": "FluxTransformer2DModel"})
    must_equal(("a", 1, "b", 1))
    with pytest.raises(CheckpointError, match="a 2 does not fit the transformer's b 1: parts of two models"):
        must_equal(("a", 1, "b", 1), ("a", 2, "b", 1))


def test_contexts_repeat_by_prompt():
    context = Context(torch.arange(6.0).view(3, 2, 1), (2, 1, 2))
    assert context.select([0, 1, 2]) is context
    chosen = context.select([2, 0, 0])
    assert chosen.lengths == (2, 2, 2)
    assert torch.equal(chosen.tokens, context.tokens[[2, 0, 0]])
