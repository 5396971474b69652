"""Tiny Z-Image networks with random weights: diffusers' own as the oracle (`factory` makes whole folders)."""

from __future__ import annotations

import copy

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests import networks
from tests.factory import TRANSFORMER, randomize
from twinflow_rt.models.transformers.z_image import ZImageConfig

SMALL = ZImageConfig.from_dict(TRANSFORMER)
# image tokens 64, 15, 20 and 33 are not all multiples of 32
SHAPES = ((16, 16, (20,)), (6, 10, (7, 40, 33)), (20, 4, (64, 64)), (6, 22, (1, 100)))


class TwinFlowReference(networks.Reference):
    """diffusers' network; its time embedding replaced by TwinFlow's formula for scalars, in float64."""

    prefix = "t_embedder_2"

    def __init__(self, config: ZImageConfig = SMALL, seed: int = 1) -> None:
        from diffusers import ZImageTransformer2DModel

        raw = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        network = randomize(ZImageTransformer2DModel(**raw), seed)
        super().__init__(network, randomize(copy.deepcopy(network.t_embedder), seed + 1))

    def predict(self, args: networks.Inputs, t: float) -> Tensor:
        prompts = [e[:n] for e, n in zip(args.embeds, args.lengths, strict=True)]
        times = torch.full((len(prompts),), 1 - t)
        out = self.network(list(args.latents.unsqueeze(2).unbind()), times, prompts, return_dict=False)[0]
        return -torch.stack([o.squeeze(1) for o in out])

    def add_second(self, t: float, tt: float):
        s, s2 = (((x > 0) - (x < 0)) * (1 - abs(x)) for x in (t, tt))

        def hook(module, args, kwargs, output):
            first, second = (torch.full((len(output),), x * 1000.0) for x in (abs(s), s2 - s))
            return module.forward(first) + abs(s - s2) * self.second(second)

        return hook


@st.composite
def configs(draw) -> ZImageConfig:
    axes = draw(st.tuples(*[st.integers(1, 3)] * 3))
    heads, layers, refiners = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return ZImageConfig(
        in_channels=draw(st.integers(1, 3)), dim=2 * sum(axes) * heads, n_layers=layers, n_refiner_layers=refiners,
        n_heads=heads, n_kv_heads=heads, cap_feat_dim=5, axes_dims=tuple(2 * a for a in axes), axes_lens=(576, 32, 32),
    )  # fmt: skip
