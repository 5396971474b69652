"""The decoder half of an AutoencoderDC (DC-AE, arXiv 2410.10733; diffusers), under the checkpoint's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ...ops import OpTable
from ..architecture import Architecture
from ..layers import MixFeedForward, ModuleList, UpsampleConv
from .decoder import HalvedDecoder, ScaledLatents

EPS = 1e-5
FFN_RATIO = 4
FUSED = {"attn.to_qkv.weight": ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight")}


@dataclass(frozen=True)
class DCConfig(ScaledLatents):
    """The fields of vae/config.json that the decoder needs; per level, finest first."""

    latent_channels: int
    out_channels: int
    head_dim: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    attentive: tuple[bool, ...]
    scales: tuple[tuple[int, ...], ...]
    interpolate: bool
    scaling_factor: float
    shift_factor: float = 0.0

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> DCConfig:
        """Build from config.json's content, with diffusers' defaults for what SANA's older files lack. Raises
        ConfigError for other kinds of blocks."""
        name = raw.get("_class_name")
        if name != "AutoencoderDC":
            raise ConfigError(f"vae/config.json says _class_name {name!r}; SANA's VAE is an AutoencoderDC")
        try:
            channels = tuple(raw["decoder_block_out_channels"])

            def each(key: str) -> tuple[Any, ...]:
                return tuple(raw[key]) if not isinstance(raw[key], str) else (raw[key],) * len(channels)

            kinds = each("decoder_block_types")
            unknown = (
                {*kinds} - {"ResBlock", "EfficientViTBlock"} | {*each("decoder_norm_types")} - {"rms_norm"}
                | {*each("decoder_act_fns")} - {"silu"} | {raw.get("decoder_conv_act_fn", "relu")} - {"relu"}
            )  # fmt: skip
            config = cls(
                raw["latent_channels"], raw["in_channels"], raw["attention_head_dim"], channels,
                each("decoder_layers_per_block"), tuple(kind == "EfficientViTBlock" for kind in kinds),
                tuple(map(tuple, raw["decoder_qkv_multiscales"])), raw["upsample_block_type"] == "interpolate",
                raw["scaling_factor"],
            )  # fmt: skip
            shortcut = raw.get("decoder_in_shortcut", True)
        except KeyError as error:
            raise ConfigError(f"vae/config.json lacks {error}; download it again") from None
        if unknown or not shortcut or min(config.depths) < 1:
            raise ConfigError(
                f"vae/config.json asks for {sorted(unknown) or 'another shape'}; supported is SANA's DC-AE: rms_norm, "
                "silu and relu, a shortcut at its entry, blocks on every level"
            )
        return config

    @property
    def scale(self) -> int:
        """Pixels per latent, along each axis."""
        return 1 << (len(self.channels) - 1)

    @property
    def local_levels(self) -> int:
        """Levels, finest first, that follow all attention (at most all but the coarsest)."""
        return (*self.attentive[:-1], True).index(True)


class Norm(nn.Module):
    """RMS over the channels of [B, H, W, C], with weight and bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return ops.rms_norm(x.contiguous(), self.weight.float(), EPS) + self.bias.to(x.dtype)


def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the convolution of x [B, H, W, C], which is a channels-last image as it lies."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = Norm(channels)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return x + self.norm(conv(self.conv2, F.silu(conv(self.conv1, x))), ops)


class MultiscaleProjection(nn.Module):
    """Queries, keys and values [B, H, W, channels] that see their neighbours."""

    def __init__(self, channels: int, head_dim: int, size: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False)
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=channels // head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return conv(self.proj_out, conv(self.proj_in, x))


class MultiscaleAttention(nn.Module):
    """Linear attention. A head is 3 * head_dim consecutive channels of the projections: its q, k and v."""

    def __init__(self, channels: int, head_dim: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        inner, self.head_dim = channels // head_dim * head_dim, head_dim
        self.to_qkv = nn.Linear(channels, 3 * inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(MultiscaleProjection(3 * inner, head_dim, size) for size in scales)
        self.to_out = nn.Linear(inner * (1 + len(scales)), channels, bias=False)
        self.norm_out = Norm(channels)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        qkv = self.to_qkv(x)
        qkv = torch.cat((qkv, *(projection(qkv) for projection in self.to_qkv_multiscale)), -1).flatten(1, 2)
        q, k, v = qkv.unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)
        return x + self.norm_out(self.to_out(ops.linear_attention(q, k, v)).view_as(x), ops)


class GatedConvolution(MixFeedForward):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, FFN_RATIO * channels)
        self.norm = Norm(channels)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:  # type: ignore[override]
        return x + self.norm(super().forward(x), ops)


class AttentiveBlock(nn.Module):
    def __init__(self, channels: int, head_dim: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.attn = MultiscaleAttention(channels, head_dim, scales)
        self.conv_out = GatedConvolution(channels)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.conv_out(self.attn(x, ops), ops)


class Upsample(nn.Module):
    """Twice the size, by a convolution beside a shortcut that spreads channels over pixels."""

    def __init__(self, inner: int, outer: int, interpolate: bool) -> None:
        super().__init__()
        self.repeats = 4 * outer // inner
        self.conv = UpsampleConv(inner, outer) if interpolate else nn.Conv2d(inner, 4 * outer, 3, padding=1)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        image = x.permute(0, 3, 1, 2)
        if isinstance(self.conv, UpsampleConv):
            h = self.conv.enlarged(image, ops)
        else:
            h = F.pixel_shuffle(self.conv(image), 2)
        shortcut = F.pixel_shuffle(image.repeat_interleave(self.repeats, 1), 2)
        return (h + shortcut).permute(0, 2, 3, 1)


class Decoder(nn.Module):
    def __init__(self, config: DCConfig) -> None:
        super().__init__()
        channels, last = config.channels, len(config.channels) - 1
        self.split = config.local_levels
        self.repeats = channels[-1] // config.latent_channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.up_blocks: ModuleList[ModuleList[Any]] = ModuleList()
        for i, (width, depth) in enumerate(zip(channels, config.depths, strict=True)):
            level: list[nn.Module] = [] if i == last else [Upsample(channels[i + 1], width, config.interpolate)]
            for _ in range(depth):
                attentive = config.attentive[i]
                level.append(AttentiveBlock(width, config.head_dim, config.scales[i]) if attentive else ResBlock(width))
            self.up_blocks.append(ModuleList(level))
        self.norm_out = Norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def trunk(self, latents: Tensor, ops: OpTable) -> Tensor:
        x = (self.conv_in(latents) + latents.repeat_interleave(self.repeats, 1)).permute(0, 2, 3, 1)
        return self._run(self.up_blocks[self.split :], x, ops).permute(0, 3, 1, 2)

    def tail(self, features: Tensor, ops: OpTable) -> Tensor:
        x = self._run(self.up_blocks[: self.split], features.permute(0, 2, 3, 1), ops)
        return self.conv_out(F.relu(self.norm_out(x, ops)).permute(0, 3, 1, 2))

    def _run(self, levels: ModuleList[ModuleList[Any]], x: Tensor, ops: OpTable) -> Tensor:
        for level in reversed(levels):
            for layer in level:
                x = layer(x, ops)
        return x


class DCDecoder(HalvedDecoder):
    """The decoder of an AutoencoderDC."""

    def __init__(self, config: DCConfig) -> None:
        convs = (0, *(2 * depth for depth in config.depths[: config.local_levels][::-1]))
        super().__init__(config, Decoder(config), convs, None)


MODEL = Architecture(DCConfig, DCDecoder, lambda config: Layout(FUSED, ("encoder.",), float32_where(".norm")))
