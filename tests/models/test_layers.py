"""Modules that are found as plain attributes are the ones that are registered, however they come and go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from twinflow_rt.models.layers import Module, pack, unpack


class Pair(Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)
        self.size = 5


def same(module: Module) -> bool:
    found = {name: value for name, value in vars(module).items() if isinstance(value, nn.Module)}
    return found == {name: value for name, value in module.named_children()}


def test_modules_that_come_and_go():
    pair = Pair()
    assert same(pair) and [name for name, _ in pair.named_parameters()] == [
        "first.weight", "first.bias", "second.weight", "second.bias",
    ]  # fmt: skip
    pair.first = other = nn.Linear(2, 3)
    assert pair.first is other and pair.get_submodule("first") is other and same(pair)
    pair.second = None
    assert pair.second is None and same(pair) and "second" not in dict(pair.named_children())
    pair.first = nn.Parameter(other.weight)
    assert pair.first is pair.get_parameter("first") and same(pair)
    pair.second = nn.Identity()
    del pair.second
    assert same(pair) and pair.size == 5
    with pytest.raises(AttributeError):
        pair.second  # noqa: B018


def test_copies_hold_their_own():
    pair = Pair()
    twin = copy.deepcopy(pair)
    assert same(twin) and twin.first is not pair.first
    twin.set_submodule("first", nn.Identity())
    assert same(twin) and isinstance(twin.first, nn.Identity) and isinstance(pair.first, nn.Linear)


def test_packing_orders_features_channel_first():
    latents = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    # token (row 1, column 2), feature (channel 1, dy 1, dx 0)
    assert tokens[1, 1 * 3 + 2, 1 * 4 + 1 * 2 + 0] == latents[1, 1, 2 * 1 + 1, 2 * 2 + 0]
    assert torch.equal(unpack(tokens, 2, 3), latents)
