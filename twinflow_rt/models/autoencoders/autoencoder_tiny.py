"""The decoder half of an AutoencoderTiny (diffusers; taesd, taesd3, taef1), under the checkpoint's names.

A distilled stand-in for an AutoencoderKL's decoder, of 1.2 million parameters, for previews. It takes normalised
latents, as the sampler leaves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout
from ...errors import ConfigError
from ...ops import EAGER
from ..architecture import Architecture
from .decoder import ScaledLatents

REACH = 3.0  # latents are softly limited to +-3


@dataclass(frozen=True)
class TinyConfig(ScaledLatents):
    """The fields of config.json that the decoder needs; channels and blocks per level, coarsest first."""

    latent_channels: int
    out_channels: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    scaling: int
    scaling_factor: float
    shift_factor: float

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TinyConfig:
        """Build from config.json's content, with diffusers' defaults."""
        name = raw.get("_class_name")
        if name != "AutoencoderTiny":
            raise ConfigError(f"config.json says _class_name {name!r}; a preview decoder is an AutoencoderTiny")
        channels = tuple(raw.get("decoder_block_out_channels", (64, 64, 64, 64)))
        blocks = tuple(raw.get("num_decoder_blocks", (3, 3, 3, 1)))
        kinds = raw.get("act_fn", "relu"), raw.get("upsample_fn", "nearest")
        if kinds != ("relu", "nearest"):
            raise ConfigError(f"config.json asks for {' and '.join(map(str, kinds))}; supported are relu and nearest")
        if len(channels) != len(blocks) or not blocks or len(set(channels)) != 1:
            raise ConfigError(f"config.json: {channels} channels and {blocks} blocks; all levels must be equally wide")
        return cls(
            raw.get("latent_channels", 4), raw.get("out_channels", 3), channels, blocks,
            raw.get("upsampling_scaling_factor", 2), raw.get("scaling_factor", 1.0), raw.get("shift_factor", 0.0),
        )  # fmt: skip

    @property
    def scale(self) -> int:
        """Pixels per latent, along each axis."""
        return int(self.scaling ** (len(self.blocks) - 1))


class Block(nn.Module):
    """Three convolutions with a shortcut: relu(conv(relu(conv(relu(conv(x))))) + x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict({str(i): nn.Conv2d(channels, channels, 3, padding=1) for i in (0, 2, 4)})

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.conv.values()
        return third(second(first(x).relu_()).relu_()).add_(x).relu_()


class TinyDecoder(nn.Module):
    """Normalised latents [B, latent_channels, h, w] to images [B, 3, h*scale, w*scale], nominally in [-1, 1]."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config, self.ops = config, EAGER
        width, last = config.channels[0], len(config.blocks) - 1
        # a sequence in the checkpoint: 0 the first convolution, 1 its activation, then per level its blocks, an
        # upsampling (but on the last) and a convolution
        layers: dict[str, nn.Module] = {"0": nn.Conv2d(config.latent_channels, width, 3, padding=1)}
        self.order: list[str] = ["0", "relu"]
        at = 2
        for level, count in enumerate(config.blocks):
            for _ in range(count):
                layers[str(at)] = Block(width)
                self.order.append(str(at))
                at += 1
            if level < last:
                self.order.append("upsample")
                at += 1
            out = config.out_channels if level == last else width
            layers[str(at)] = nn.Conv2d(width, out, 3, padding=1, bias=level == last)
            self.order.append(str(at))
            at += 1
        self.decoder = nn.ModuleDict({"layers": nn.ModuleDict(layers)})

    def forward(self, latents: Tensor) -> Tensor:
        x, layers = torch.tanh(latents / REACH) * REACH, self.decoder["layers"]
        for name in self.order:
            if name == "relu":
                x = x.relu_()
            elif name == "upsample":
                x = F.interpolate(x, scale_factor=float(self.config.scaling), mode="nearest")
            else:
                x = layers[name](x)  # type: ignore[index]
        return x * 2 - 1


MODEL = Architecture(TinyConfig, TinyDecoder, lambda config: Layout(unused=("encoder.",)))
