"""Z-Image against diffusers' network, and against TwinFlow's formula for its second embedder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.factory import CHANNELS, TEXT_DIM, second_embedder, transformer
from twinflow_rt.checkpoint.fuse import merge
from twinflow_rt.errors import ConfigError
from twinflow_rt.models.transformers.z_image import FUSED, ZImageConfig, ZImageTransformer

# latent height and width, prompt lengths; image tokens 64, 15, 20 and 33 are not all multiples of 32
SHAPES = [(16, 16, (20,)), (6, 10, (7, 40, 33)), (20, 4, (64, 64)), (6, 22, (1, 100))]
TIMES = [(1.0, 0.0), (0.6, 0.25), (0.5, 0.5), (-0.75, -0.5)]


class TwinTime(nn.Module):
    """Stands in for diffusers' t_embedder; TwinFlow's formula, written out for scalars, in float64."""

    def __init__(self, first: nn.Module, second: nn.Module, t: float, tt: float) -> None:
        super().__init__()
        self.first, self.second, self.t, self.tt = first, second, t, tt

    def forward(self, ignored: torch.Tensor) -> torch.Tensor:
        s, s2 = ((x > 0) - (x < 0) for x in (self.t, self.tt))
        s, s2 = s * (1 - abs(self.t)), s2 * (1 - abs(self.tt))
        n = len(ignored)
        out = self.first(torch.full((n,), abs(s) * 1000.0))
        return out + abs(s - s2) * self.second(torch.full((n,), (s2 - s) * 1000.0))


@pytest.fixture(scope="module")
def reference():
    return transformer()


@pytest.fixture(scope="module")
def network(reference):
    return ours(reference)


def ours(reference, second: str = "random") -> ZImageTransformer:
    network = ZImageTransformer(ZImageConfig.from_dict(dict(reference.config))).eval()
    network.load_state_dict(merge({**reference.state_dict(), **second_embedder(reference, second)}, FUSED))
    return network


def inputs(height: int, width: int, lengths: tuple[int, ...], dtype=torch.float32):
    g = torch.Generator().manual_seed(height)
    latents = torch.randn(len(lengths), CHANNELS, height, width, generator=g).to(dtype)
    embeds = torch.randn(len(lengths), max(lengths), TEXT_DIM, generator=g).to(dtype)
    return latents, embeds, lengths


@torch.no_grad()
def theirs(reference, latents, embeds, lengths, t: float, tt: float | None = None) -> torch.Tensor:
    """diffusers' velocity z - x; with `tt`, under TwinFlow's time embedding."""
    if tt is not None:
        second = copy.deepcopy(reference.t_embedder)
        second.load_state_dict({k.partition(".")[2]: v for k, v in second_embedder(reference, "random").items()})
        reference = copy.copy(reference)
        reference._modules = {**reference._modules, "t_embedder": TwinTime(reference.t_embedder, second, t, tt)}
    prompts = [e[:n] for e, n in zip(embeds, lengths, strict=True)]
    times = torch.full((len(lengths),), 1 - t)
    out = reference(list(latents.unsqueeze(2).unbind()), times, prompts, return_dict=False)[0]
    return -torch.stack([o.squeeze(1) for o in out])


@torch.no_grad()
def velocity(network, latents, embeds, lengths, t: float, tt: float) -> torch.Tensor:
    modulation = network.modulate(*torch.tensor([[t], [tt]], dtype=torch.float64))
    return network(latents, modulation, network.encode_context(embeds, lengths))


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [1.0, 0.37])
def test_equals_diffusers_where_the_second_embedder_is_silent(reference, shape, t):
    args = inputs(*shape)
    assert relative(velocity(ours(reference, "zero"), *args, t, 0.0), theirs(reference, *args, t)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("times", TIMES)
def test_equals_diffusers_with_twinflows_time_formula(reference, network, shape, times):
    args = inputs(*shape)
    assert relative(velocity(network, *args, *times), theirs(reference, *args, *times)) < 1e-5


def test_the_second_embedder_matters_but_not_at_one_step(reference, network):
    args = inputs(*SHAPES[1])
    assert relative(velocity(network, *args, 0.6, 0.25), theirs(reference, *args, 0.6)) > 1e-2
    assert relative(velocity(network, *args, 1.0, 0.0), theirs(reference, *args, 1.0)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_as_exact_as_diffusers(reference, network, shape):
    """Root-mean-square error against float32 on the same bf16-rounded inputs."""
    args = inputs(*shape, dtype=torch.bfloat16)
    exact = velocity(network, args[0].float(), args[1].float(), args[2], 1.0, 0.0)
    error = (velocity(ours(reference).bfloat16(), *args, 1.0, 0.0).float() - exact).square().mean().sqrt()
    bound = (theirs(copy.deepcopy(reference).bfloat16(), *args, 1.0).float() - exact).square().mean().sqrt()
    assert error <= 1.1 * bound


def test_a_batch_equals_its_samples_and_ignores_padding(network):
    """Ragged prompts, (t, tt) per sample, NaN beyond each prompt's end."""
    latents, embeds, lengths = inputs(*SHAPES[1])
    for row, n in zip(embeds, lengths, strict=True):
        row[n:] = float("nan")
    t, tt = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.0, 0.7, 0.1])
    with torch.no_grad():
        whole = network(latents, network.modulate(t, tt), network.encode_context(embeds, lengths))
    for i, n in enumerate(lengths):
        one = slice(i, i + 1)
        alone = velocity(network, latents[one], embeds[one, :n], (n,), t[i].item(), tt[i].item())
        assert relative(whole[one], alone) < 1e-5


def test_config_round_trip_and_refusals(reference):
    config = ZImageConfig.from_dict(dict(reference.config))
    assert ZImageConfig.from_dict(config.to_dict()) == config
    for change, message in (
        ({"axes_dims": [8, 8, 16]}, "add up"),
        ({"n_kv_heads": 1}, "n_kv_heads"),
        ({"all_patch_size": [4]}, "patch sizes"),
        ({"joint_attention_dim": 3}, "does not know"),
    ):
        with pytest.raises(ConfigError, match=message):
            ZImageConfig.from_dict({**config.to_dict(), **change})
