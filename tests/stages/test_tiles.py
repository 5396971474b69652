"""Decoding in tiles against decoding whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import qwen_image_factory, sana_factory
from tests.factory import VAE, randomize, read
from twinflow_rt.errors import CancelledError, ConfigError
from twinflow_rt.models.autoencoders import autoencoder_dc, autoencoder_kl, autoencoder_qwen
from twinflow_rt.stages import tiles
from twinflow_rt.stages.stage import StageOptions
from twinflow_rt.stages.vae import VaeDecoder

CPU = torch.device("cpu")


def stage(kind, folder):
    from diffusers import AutoencoderKL

    made, model = {
        "kl": (lambda: randomize(AutoencoderKL(**VAE), 0), autoencoder_kl.MODEL),
        "qwen": (qwen_image_factory.autoencoder, autoencoder_qwen.MODEL),
        "dc": (sana_factory.autoencoder, autoencoder_dc.MODEL),
    }[kind]
    made().save_pretrained(folder / "vae")
    return read(VaeDecoder(folder / "vae", model))


@pytest.fixture(scope="module", params=["kl", "qwen", "dc"])
def decoder(request, tmp_path_factory):
    return stage(request.param, tmp_path_factory.mktemp(request.param))


def latents(decoder, *size, batch=1):
    return torch.randn(batch, decoder.channels, *size, generator=torch.Generator().manual_seed(0))


def test_trunk_and_tail_are_the_network(decoder):
    x = latents(decoder, 4, 6)
    with torch.inference_mode():
        whole, features = decoder.network(x), decoder.network.trunk(x)
        assert torch.equal(whole, decoder.network.tail(features))
    assert features.shape[2] * tiles.cell(decoder.network) == whole.shape[2]


def test_nothing_beyond_reach_is_read(decoder):
    """Features outside a pixel's reach change nothing (group norms aside, whose statistics are fixed here)."""
    network, ops = decoder.network, decoder.ops
    far = tiles.reach(network.convs)
    network.ops = replace(ops, group_norm_silu=lambda x, *_: x)
    channels, size = network.trunk(latents(decoder, 1, 1)).shape[1], tiles.cell(network)
    x = torch.randn(1, channels, 1, 2 * far + 3, generator=torch.Generator().manual_seed(0))

    def pixels(beyond):
        """Those of the middle cell, where cells further than `beyond` from it are others."""
        changed = x.clone()
        changed[..., : far + 1 - beyond] = changed[..., far + 2 + beyond :] = 3.0
        return network.tail(changed)[..., (far + 1) * size : (far + 2) * size]

    try:
        with torch.inference_mode():
            expected, at_reach, inside = pixels(far + 1), pixels(far), pixels(far // 2)
    finally:
        network.ops = ops
    assert (at_reach - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (inside - expected).abs().max() > 1e-6 * expected.abs().max()  # the bound means something


@pytest.mark.parametrize(("tile", "size"), [(64, (40, 9)), (128, (21, 40))])
def test_equals_the_whole_where_nothing_is_global(decoder, tile, size):
    """Exact but for the order of sums without group norms; with them within what docs/stages.md says of
    random weights, and free of seams: neighbouring pixels differ no more than in the whole image."""
    x = latents(decoder, *size, batch=2)
    tile = max(tile, tiles.smallest(decoder.network))
    with torch.inference_mode():
        whole, ours = decoder.network(x), tiles.decode(decoder.network, x, tile)
    assert ours.shape == whole.shape
    error = (ours - whole).abs().max() / whole.abs().max()
    if not tiles.blends(decoder.network):
        assert error < 1e-5
        return
    assert error < 0.25
    for axis in (2, 3):
        assert ours.diff(dim=axis).abs().max() < 1.1 * whole.diff(dim=axis).abs().max()


def test_an_image_of_one_tile_is_bit_for_bit_the_whole(decoder):
    x = latents(decoder, 4, 4)
    with torch.inference_mode():
        assert torch.equal(tiles.decode(decoder.network, x, 4096), decoder.network(x))


def test_cuts_and_ramps_cover_every_pixel_once():
    for length in range(1, 70):
        for core in (16, 17, 40):
            spans = tiles.cuts(length, core)
            assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]
            assert spans[0][0] == 0 and spans[-1][1] == length
            assert max(b - a for a, b in spans) <= core
            for far in (0, 5, 30):
                side = tiles.window_side(length, core, far)
                windows = [tiles.window(a, side, length, far) for a, _ in spans]
                assert {w.stop - w.start for w in windows} == {side}
                for (a, b), w in zip(spans, windows, strict=True):
                    assert 0 <= w.start <= max(a - far, 0) and min(b + far, length) <= w.stop <= length
            total = torch.zeros(length * 2)
            blend = min(8, min(b - a for a, b in spans) // 2)
            for span in spans:
                at = tiles.around(*span, length, blend)
                total[tiles.pixels(at, 2)] += tiles.ramp(span, at, length, blend, 2) if blend else 1
            assert (total - 1).abs().max() < 1e-6


def test_the_stage_takes_a_tile_size(decoder):
    x = latents(decoder, 30, 20)
    options, decoder.options = decoder.options, StageOptions(tile=tiles.smallest(decoder.network))
    calls = []
    try:
        with torch.inference_mode():
            ours = decoder.decode(x)
            with pytest.raises(CancelledError):
                decoder.decode(x, check=lambda: calls.append(1) or (_ for _ in ()).throw(CancelledError("no")))
    finally:
        decoder.options = options
    assert ours.shape == (1, 3, 30 * decoder.scale, 20 * decoder.scale) and len(calls) == 1


@pytest.mark.parametrize("tile", [0, -8, 7, 64.0, True, "64"])
def test_impossible_tiles(decoder, tile):
    with pytest.raises(ConfigError, match="tile must be a number of pixels"):
        tiles.check_tile(decoder.network, tile)
