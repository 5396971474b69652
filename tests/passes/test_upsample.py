"""Folding of upsampling convolutions: what is kept, what is saved, what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from twinflow_rt.models.layers import UpsampleConv
from twinflow_rt.ops import EAGER, Target, fold_upsample
from twinflow_rt.ops.selection import Choice, choose
from twinflow_rt.passes.convolutions import fold_upsampling, folded_bytes

FOLDED, PLAIN = (Choice("upsample_conv", "folded"),), (Choice("upsample_conv", "eager"),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folds_beside_the_weights_and_back(dtype):
    network = nn.Sequential(UpsampleConv(6, 4), nn.Conv2d(4, 4, 3)).to(dtype)
    conv, saved = network[0], {name: x.clone() for name, x in network.state_dict().items()}
    x = torch.randn(2, 6, 5, 7).to(dtype)
    with torch.no_grad():
        plain = conv.enlarged(x, EAGER)
        fold_upsampling(network, FOLDED)
        assert torch.equal(conv.folded, fold_upsample(conv.weight))
        assert conv.folded.nbytes == folded_bytes(network, dtype)
        folded = conv.enlarged(x, EAGER)
    assert folded.shape == plain.shape == (2, 4, 10, 14) and folded.dtype == dtype
    torch.testing.assert_close(folded, plain, rtol=0, atol=8 * torch.finfo(dtype).eps * plain.abs().max().item())
    kept = network.state_dict()
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], x) for name, x in saved.items())
    fold_upsampling(network, PLAIN)
    assert conv.folded is None


def test_where_it_is_chosen():
    assert choose("upsample_conv", Target("cpu", torch.float32)).chosen == "folded"
    assert choose("upsample_conv", Target("mps", torch.float32)).chosen == "eager"
    ((_, reason),) = choose("upsample_conv", Target("cpu", torch.float32, training=True)).refused
    assert "trained" in reason
