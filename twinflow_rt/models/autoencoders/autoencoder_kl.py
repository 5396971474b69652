"""The halves of an AutoencoderKL (diffusers), under the checkpoint's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout
from ...errors import ConfigError
from ...ops import OpTable
from ..architecture import Architecture
from ..layers import UpsampleConv
from .decoder import (
    HalvedDecoder,
    HalvedEncoder,
    Level,
    LevelsDecoder,
    LevelsEncoder,
    ScaledLatents,
    halved,
    no_encoder,
)

EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig(ScaledLatents):
    """The fields of vae/config.json that are needed."""

    latent_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    scaling_factor: float
    shift_factor: float
    sample_size: int
    quant: bool
    post_quant: bool
    mid_attention: bool

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> AutoencoderConfig:
        """Build from config.json's content, with diffusers' defaults. Raises ConfigError for other block types."""
        name = raw.get("_class_name", "AutoencoderKL")
        if name != "AutoencoderKL":
            raise ConfigError(f"vae/config.json says _class_name {name!r}; this family's VAE is an AutoencoderKL")
        channels = tuple(raw.get("block_out_channels", (64,)))
        kinds = set(raw.get("up_block_types", ("UpDecoderBlock2D",)))
        if kinds != {"UpDecoderBlock2D"} or raw.get("act_fn", "silu") not in ("silu", "swish"):
            raise ConfigError(f"vae/config.json asks for {sorted(kinds)}; only UpDecoderBlock2D with silu is supported")
        if raw.get("latents_mean") is not None or raw.get("latents_std") is not None:
            raise ConfigError("vae/config.json has per-channel latents_mean or latents_std: another family's VAE")
        size = raw.get("sample_size", 32)
        return cls(
            raw.get("latent_channels", 4), raw.get("out_channels", 3), channels, raw.get("layers_per_block", 1),
            raw.get("norm_num_groups", 32), raw.get("scaling_factor", 0.18215), raw.get("shift_factor") or 0.0,
            size if isinstance(size, int) else size[0], raw.get("use_quant_conv", True),
            raw.get("use_post_quant_conv", True), raw.get("mid_block_add_attention", True),
        )  # fmt: skip

    @property
    def inner_channels(self) -> int:
        """Channels that the networks make and read."""
        return self.latent_channels

    @property
    def scale(self) -> int:
        """Pixels per latent, along each axis."""
        return 1 << (len(self.block_out_channels) - 1)


class Norm(nn.GroupNorm):
    def silu(self, x: Tensor, ops: OpTable) -> Tensor:
        """Return SiLU of the norm."""
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


class SpatialAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = UpsampleConv(channels, channels)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.conv.enlarged(x, ops)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return halved(self.conv, x)


class AutoencoderEncoder(HalvedEncoder):
    """The encoder of an AutoencoderKL."""

    def __init__(self, config: AutoencoderConfig) -> None:
        channels, groups, depth = config.block_out_channels, config.groups, config.layers_per_block
        norm = lambda width: Norm(groups, width, EPS)
        levels: list[nn.Module] = [
            Level(inner, outer, depth, norm, Downsample(outer) if i + 1 < len(channels) else None, "downsamplers")
            for i, (inner, outer) in enumerate(zip((channels[0], *channels), channels, strict=False))
        ]
        last, moments = channels[-1], 2 * config.inner_channels
        attention = SpatialAttention(last, groups) if config.mid_attention else None
        encoder = LevelsEncoder(levels, channels[0], last, norm, attention, "conv_norm_out", moments)
        quant = nn.Conv2d(moments, moments, 1) if config.quant else None
        super().__init__(config, encoder, (2 * depth,) * len(channels), quant)


class AutoencoderDecoder(HalvedDecoder):
    """The decoder of an AutoencoderKL."""

    def __init__(self, config: AutoencoderConfig) -> None:
        channels, groups, depth = config.block_out_channels[::-1], config.groups, config.layers_per_block + 1
        decoder = LevelsDecoder(
            config.inner_channels, list(zip((channels[0], *channels), channels, strict=False)), depth,
            lambda width: Norm(groups, width, EPS),
            SpatialAttention(channels[0], groups) if config.mid_attention else None,
            Upsample, "conv_norm_out", config.out_channels,
        )  # fmt: skip
        latents = config.inner_channels
        super().__init__(
            config, decoder, (2 * depth,) * len(channels), nn.Conv2d(latents, latents, 1) if config.post_quant else None
        )


ENCODER = Architecture(
    AutoencoderConfig, AutoencoderEncoder,
    lambda config: Layout(unused=("decoder.", "post_quant_conv."), absent=no_encoder),
)  # fmt: skip
MODEL = Architecture(
    AutoencoderConfig, AutoencoderDecoder, lambda config: Layout(unused=("encoder.", "quant_conv.")), encoder=ENCODER
)
