"""Winograd's form of 3x3 convolutions: the algebra in float64, and the native one against float64 convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.kernels.oracle import draw
from twinflow_rt import ops
from twinflow_rt.models.layers import UpsampleConv
from twinflow_rt.ops.conv import LEAST, STRIP, conv3x3, winograd_points, winograd_weight
from twinflow_rt.ops.native import library
from twinflow_rt.ops.native.conv import conv_winograd
from twinflow_rt.ops.selection import Choice, choose
from twinflow_rt.passes.convolutions import fold_upsampling, folded_bytes

native = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or bool(library.unavailable_reason()), reason="needs oneDNN and the build"
)
# tiles: one, fewer than LEAST, of odd sizes, several strips of which the last is short; channels beyond a register
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 5, 7), (1, 16, 130, 9, 4), (3, 130, 17, 12, 34), (1, 40, 24, 33, 63)]


@native
@pytest.mark.parametrize("enlarged", [False, True])
def test_matrices_are_the_transformed_kernels(enlarged):
    """G g G^T, of which the points that an enlargement makes zero are left out."""
    weight = draw(5, 3, 3, 3)
    g = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]).double() / 2
    full = g @ weight.double() @ g.T
    kept = full[..., [0, 1, 3], :][..., [0, 1, 3]] if enlarged else full
    packed = winograd_weight(weight, enlarged).to_dense().reshape(winograd_points(enlarged), 5, 3)
    assert torch.equal(packed, kept.flatten(2).permute(2, 0, 1).float())


@native
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("enlarged", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_exact_as_the_direct_sum(shape, enlarged, adds, bias, layout):
    batch, inner, outer, height, width = shape
    x = draw(batch, inner, height, width).contiguous(memory_format=layout)
    weight, b = draw(outer, inner, 3, 3, seed=1) / (9 * inner) ** 0.5, draw(outer, seed=2) if bias else None
    added = draw(batch, outer, height << enlarged, width << enlarged, seed=3) if adds else None
    double = [None if t is None else t.double() for t in (weight, b)]
    exact = conv3x3(x.double(), *double, enlarged, None if added is None else added.double())
    got = conv_winograd(x, winograd_weight(weight, enlarged), b, enlarged, added)
    assert got.shape == exact.shape and got.is_contiguous(memory_format=torch.channels_last)
    assert (got - exact).abs().max() <= 3e-6 * exact.abs().max().clamp_min(1)
    if inner > 1:  # sums of one channel are nearly exact
        direct = conv3x3(x, weight, b, enlarged, added)
        assert (got - exact).square().mean() <= 2**2 * (direct - exact).square().mean()


@native
def test_strips_cover_every_tile_once():
    """Values differ from strip to strip, the last of which is short: any tile left out or doubled would show."""
    height = 2 * (STRIP + LEAST // 2)  # one column of tiles
    x = torch.arange(height, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, -1, 2).contiguous()
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 0, 1, 1] = weight[1, 1, 1, 1] = 1
    assert torch.equal(conv_winograd(x, winograd_weight(weight, False), None), x)


@native
def test_equal_calls_give_equal_bits_and_nothing_of_nothing():
    x, weight = draw(1, 8, 20, 20), winograd_weight(draw(8, 8, 3, 3), False)
    assert torch.equal(conv_winograd(x, weight, None), conv_winograd(x, weight, None))
    assert conv_winograd(x[:0], weight, None).shape == (0, 8, 20, 20)


@native
def test_wrong_arguments_are_named():
    x, weight = draw(1, 8, 4, 4), winograd_weight(draw(6, 8, 3, 3), False)
    with pytest.raises(ValueError, match="meet a weight of 8"):
        conv_winograd(x[:, :4], weight, None)
    with pytest.raises(ValueError, match=r"bias is not \[6\]"):
        conv_winograd(x, weight, torch.zeros(8))
    with pytest.raises(ValueError, match="what is added"):
        conv_winograd(x, weight, None, added=x)
    with pytest.raises(TypeError, match="float32"):
        conv_winograd(x.half(), weight, None)
    with pytest.raises(ValueError, match="dtype"):
        conv_winograd(x.bfloat16(), weight, None)


def test_of_an_enlargement_is_upsample_conv():
    x, weight, bias = draw(1, 3, 4, 5), draw(2, 3, 3, 3), draw(2)
    assert torch.equal(conv3x3(x, weight, bias, enlarged=True), ops.upsample_conv(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_enlargement_folds_beside_the_weights_and_back(dtype):
    network = nn.Sequential(UpsampleConv(6, 4), nn.Conv2d(4, 4, 3)).to(dtype)
    conv, saved = network[0], {name: x.clone() for name, x in network.state_dict().items()}
    x = torch.randn(2, 6, 5, 7).to(dtype)
    with torch.no_grad():
        plain = conv.enlarged(x, ops.EAGER)
        fold_upsampling(network, (Choice("upsample_conv", "folded"),))
        assert torch.equal(conv.folded, ops.fold_upsample(conv.weight))
        assert conv.folded.nbytes == folded_bytes(network, dtype)
        folded = conv.enlarged(x, ops.EAGER)
    assert folded.shape == plain.shape == (2, 4, 10, 14) and folded.dtype == dtype
    torch.testing.assert_close(folded, plain, rtol=0, atol=8 * torch.finfo(dtype).eps * plain.abs().max().item())
    kept = network.state_dict()
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], x) for name, x in saved.items())
    fold_upsampling(network, (Choice("upsample_conv", "eager"),))
    assert conv.folded is None


def test_where_enlargements_are_folded():
    assert choose("upsample_conv", ops.Target("cpu", torch.float32)).chosen == "folded"
    assert choose("upsample_conv", ops.Target("mps", torch.float32)).chosen == "eager"
    ((_, reason),) = choose("upsample_conv", ops.Target("cpu", torch.float32, training=True)).refused
    assert "trained" in reason
