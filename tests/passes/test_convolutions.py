"""Convolutions in Winograd's form: which they are, what is kept of their kernels, what they cost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.factory import read
from tests.stages.test_vae import WIDE, saved
from twinflow_rt.models.autoencoders.autoencoder_kl import MODEL, AutoencoderDecoder
from twinflow_rt.models.layers import UpsampleConv, conv_residual
from twinflow_rt.ops import Target
from twinflow_rt.ops.native import library
from twinflow_rt.passes.convolutions import (
    NARROWEST,
    ConvertedConv2d,
    PackedConv2d,
    PackedUpsampleConv,
    WinogradConv2d,
    WinogradUpsampleConv,
    convert_convolutions,
    fold_upsampling,
    folded_bytes,
    packing_refuses,
    refuses,
    suited,
    winograd_bytes,
)
from twinflow_rt.passes.layers import unpack
from twinflow_rt.planning.meta_model import FOLDED
from twinflow_rt.stages.vae import VaeDecoder

CPU, FLOAT = torch.device("cpu"), Target("cpu", torch.float32)
N = NARROWEST
pytestmark = pytest.mark.skipif(refuses(FLOAT) is not None, reason="needs oneDNN and the build")


def test_which_layers_suit():
    network = nn.ModuleDict({
        "plain": nn.Conv2d(N, N, 3, padding=1), "enlarging": UpsampleConv(N, N + 1),
        "narrow": nn.Conv2d(N, 3, 3, padding=1),
        "from few": nn.Conv2d(N - 1, N, 3, padding=1), "strided": nn.Conv2d(N, N, 3, stride=2, padding=1),
        "grouped": nn.Conv2d(N, N, 3, padding=1, groups=2), "borderless": nn.Conv2d(N, N, 3), "1x1": nn.Conv2d(N, N, 1),
        "dilated": nn.Conv2d(N, N, 3, padding=1, dilation=2),
        "mirrored": nn.Conv2d(N, N, 3, padding=1, padding_mode="reflect"),
    })  # fmt: skip
    assert [name for name, _ in suited(network)] == ["plain", "enlarging"]


def test_which_targets_do(monkeypatch):
    assert "float32 alone" in refuses(Target("cpu", torch.bfloat16))
    assert "not on cuda" in refuses(Target("cuda", torch.float32))
    monkeypatch.setattr(library, "unavailable_reason", lambda: "not built")
    assert refuses(FLOAT) == "not built"
    network = nn.Sequential(nn.Conv2d(N, N, 3, padding=1), UpsampleConv(4, 4))
    (packed,) = convert_convolutions(network, FLOAT, network.get_parameter)
    assert (packed.kind, packed.count) == ("packed", 1) and type(network[0]) is PackedConv2d
    assert "not folded" in packing_refuses(network[1], FLOAT) and type(network[1]) is UpsampleConv
    mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    assert "border" in packing_refuses(mirrored, FLOAT)
    for target, reason in (
        (Target("cuda", torch.float32), "not cuda's"),
        (Target("cpu", torch.float16), "not float16"),
    ):
        assert reason in packing_refuses(network[0], target)
    network = nn.Sequential(nn.Conv2d(4, 4, 3))
    assert convert_convolutions(network, Target("cpu", torch.float64), network.get_parameter) == ()
    assert type(network[0]) is nn.Conv2d


def test_a_decoder_computes_the_same_and_says_so(tmp_path):
    _, folder = saved(tmp_path, **WIDE)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.float32)
    kinds = [type(m) for m in decoder.network.modules()]
    assert kinds.count(WinogradUpsampleConv) == 1 and kinds.count(WinogradConv2d) > 8
    lines = [note for note in decoder.notes() if "convolutions" in note]
    counts = {"packed": kinds.count(PackedConv2d), "winograd": kinds.count(WinogradConv2d) + 1}
    assert [f"{n} layers" in line for (kind, n), line in zip(counts.items(), lines, strict=True)] == [True, True]
    assert all(kind in line for kind, line in zip(counts, lines, strict=True))
    latents = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got = decoder.decode(latents)
        unpack(decoder.network)
        assert not any(isinstance(m, (ConvertedConv2d, PackedUpsampleConv)) for m in decoder.network.modules())
        expected = decoder.decode(latents)
    assert not torch.equal(got, expected)  # other sums, to rounding
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_ones_compute_the_same(tmp_path, dtype):
    if packing_refuses(nn.Conv2d(4, 4, 3), Target("cpu", dtype)):
        pytest.skip("this CPU does not multiply it")
    _, folder = saved(tmp_path)  # narrow
    decoder = read(VaeDecoder(folder / "vae", MODEL), dtype)
    kinds = {type(m) for m in decoder.network.modules()}
    assert {PackedConv2d, PackedUpsampleConv} <= kinds and not {nn.Conv2d, UpsampleConv, WinogradConv2d} & kinds
    latents = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got = decoder.decode(latents)
        unpack(decoder.network)
        fold_upsampling(decoder.network, FOLDED)
        expected = decoder.decode(latents)
    assert (got - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("changes", [WIDE, {}])
def test_kernels_are_kept_bit_for_bit(tmp_path, changes):
    """What is saved, and what tracers get, are the weights as they were loaded."""
    vae, folder = saved(tmp_path, **changes)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.float32)
    theirs = vae.state_dict()
    weights = decoder.parts[0].weights()
    assert len(weights) > 20 and all(torch.equal(w, theirs[name]) for name, w in weights.items())
    unpack(decoder.network)
    weights = dict(decoder.network.named_parameters())
    assert len(weights) > 20 and all(torch.equal(w, theirs[name]) for name, w in weights.items())


def test_bytes_are_those_that_are_predicted(tmp_path):
    _, folder = saved(tmp_path, **WIDE)
    plain = VaeDecoder(folder / "vae", MODEL).network
    assert isinstance(plain, AutoencoderDecoder)
    decoder = read(VaeDecoder(folder / "vae", MODEL), torch.float32)
    held = sum(p.numel() * 4 for p in decoder.network.parameters())
    held += sum(b.nbytes for b in decoder.network.buffers())
    predicted = folded_bytes(plain, torch.float32) + winograd_bytes(plain)
    assert held == sum(p.numel() * 4 for p in plain.parameters()) + predicted


def test_residuals_are_added_either_way():
    layer = nn.Conv2d(N, N, 3, padding=1).requires_grad_(False)
    x, residual = torch.randn(1, N, 4, 4), torch.randn(1, N, 4, 4)
    before = residual.clone()
    expected = conv_residual(residual, layer, x)
    network = nn.Sequential(copy.deepcopy(layer))
    convert_convolutions(network, FLOAT, network.get_parameter)
    got = conv_residual(residual, network[0], x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(residual, before) and not torch.equal(expected, layer(x))
