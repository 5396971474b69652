"""The decoder half of an AutoencoderKL (diffusers), under the checkpoint's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout
from ...errors import ConfigError
from ...ops import EAGER, OpTable
from ..architecture import Architecture
from ..layers import UpsampleConv, conv_residual

EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """The fields of vae/config.json that the decoder needs."""

    latent_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    scaling_factor: float
    shift_factor: float
    sample_size: int
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
            size if isinstance(size, int) else size[0], raw.get("use_post_quant_conv", True),
            raw.get("mid_block_add_attention", True),
        )  # fmt: skip

    @property
    def scale(self) -> int:
        """Pixels per latent, along each axis."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def offset(self) -> float:
        """Normalised latents are (raw - offset) * divisor."""
        return self.shift_factor

    @property
    def divisor(self) -> float:
        return self.scaling_factor


def norm_silu(norm: nn.GroupNorm, x: Tensor, ops: OpTable) -> Tensor:
    """Return SiLU of the norm."""
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


class Resnet(nn.Module):
    def __init__(self, inner: int, outer: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inner, EPS)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outer, EPS)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x, ops))
        h = norm_silu(self.norm2, h, ops)
        return conv_residual(x if self.conv_shortcut is None else self.conv_shortcut(x), self.conv2, h)


class SpatialAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        x = self.resnets[0](x, ops)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, ops)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = UpsampleConv(channels, channels)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.conv.enlarged(x, ops)


class UpBlock(nn.Module):
    def __init__(self, inner: int, outer: int, depth: int, groups: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(inner if i == 0 else outer, outer, groups) for i in range(depth))
        self.upsamplers = nn.ModuleList([Upsample(outer)] if upsample else [])

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, ops)
        return x


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, config.mid_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(inner, outer, config.layers_per_block + 1, groups, upsample=i + 1 < len(channels))
            for i, (inner, outer) in enumerate(zip((channels[0], *channels), channels, strict=False))
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def trunk(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.mid_block(self.conv_in(x), ops)

    def tail(self, x: Tensor, ops: OpTable) -> Tensor:
        for block in self.up_blocks:
            x = block(x, ops)
        return self.conv_out(norm_silu(self.conv_norm_out, x, ops))


class AutoencoderDecoder(nn.Module):
    """Raw latents [B, latent_channels, h, w] to images [B, 3, h*scale, w*scale], nominally in [-1, 1]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config, self.ops = config, EAGER
        channels = config.latent_channels
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.post_quant else None
        self.decoder = Decoder(config)

    @property
    def tail_convs(self) -> tuple[int, ...]:
        """3x3 convolutions that follow each other on every level of `tail`, coarsest first (see `tiles`)."""
        return (2 * (self.config.layers_per_block + 1),) * len(self.config.block_out_channels)

    def trunk(self, latents: Tensor) -> Tensor:
        """Return the features that must see all positions, through the attention, at the latents' resolution."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder.trunk(latents, self.ops)

    def tail(self, features: Tensor) -> Tensor:
        """Return the image of these features; a pixel depends on those nearby, and on all by the group norms."""
        return self.decoder.tail(features, self.ops)

    def forward(self, latents: Tensor) -> Tensor:
        return self.tail(self.trunk(latents))


MODEL = Architecture(AutoencoderConfig, AutoencoderDecoder, lambda config: Layout(unused=("encoder.", "quant_conv.")))
