"""The halves of an AutoencoderDC (DC-AE, arXiv 2410.10733; diffusers), under the checkpoint's names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ...ops import OpTable
from ..architecture import Architecture
from ..layers import MixFeedForward, ModuleList, UpsampleConv
from .decoder import HalvedDecoder, HalvedEncoder, ScaledLatents, no_encoder

EPS = 1e-5
FFN_RATIO = 4
FUSED = {"attn.to_qkv.weight": ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight")}


@dataclass(frozen=True)
class DCConfig(ScaledLatents):
    """The fields of vae/config.json that one half needs; per level, finest first.

    interpolate: whether sizes double by a nearest enlargement. strided: whether they halve by a convolution's stride.
    """

    half: ClassVar[str] = "decoder"

    latent_channels: int
    out_channels: int
    head_dim: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    attentive: tuple[bool, ...]
    scales: tuple[tuple[int, ...], ...]
    interpolate: bool
    strided: bool
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
            half, decoder = cls.half, cls.half == "decoder"
            channels = tuple(raw[f"{half}_block_out_channels"])

            def each(key: str) -> tuple[Any, ...]:
                value = raw[f"{half}_{key}"]
                return tuple(value) if not isinstance(value, str) else (value,) * len(channels)

            kinds = each("block_types")
            unknown = {*kinds} - {"ResBlock", "EfficientViTBlock"}
            if decoder:
                unknown |= {*each("norm_types")} - {"rms_norm"} | {*each("act_fns")} - {"silu"}
                unknown |= {raw.get("decoder_conv_act_fn", "relu")} - {"relu"}
            config = cls(
                raw["latent_channels"], raw["in_channels"], raw["attention_head_dim"], channels,
                each("layers_per_block"), tuple(kind == "EfficientViTBlock" for kind in kinds),
                tuple(map(tuple, raw[f"{half}_qkv_multiscales"])), raw["upsample_block_type"] == "interpolate",
                raw.get("downsample_block_type", "pixel_unshuffle") != "pixel_unshuffle", raw["scaling_factor"],
            )  # fmt: skip
            shortcut = raw.get("decoder_in_shortcut" if decoder else "encoder_out_shortcut", True)
        except KeyError as error:
            raise ConfigError(f"vae/config.json lacks {error}; download it again") from None
        if unknown or not shortcut or min(config.depths) < 1:
            raise ConfigError(
                f"vae/config.json asks for {sorted(unknown) or 'another shape'}; supported is SANA's DC-AE: rms_norm, "
                "silu and relu, a shortcut around each half, blocks on every level"
            )
        return config

    @property
    def scale(self) -> int:
        """Pixels per latent, along each axis."""
        return 1 << (len(self.channels) - 1)

    @property
    def local_levels(self) -> int:
        """Levels, finest first, without attention between them and the image (at most all but the coarsest)."""
        return (*self.attentive[:-1], True).index(True)

    @property
    def local_convs(self) -> tuple[int, ...]:
        """3x3 convolutions that follow each other on each of these, coarsest first, behind the level that has none."""
        return (0, *(2 * depth for depth in self.depths[: self.local_levels][::-1]))


class DCEncoderConfig(DCConfig):
    """The same for the encoder."""

    half = "encoder"


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


class Downsample(nn.Module):
    """Half the size, by a convolution beside a shortcut that averages what pixels become in channels."""

    def __init__(self, inner: int, outer: int, strided: bool) -> None:
        super().__init__()
        self.strided, self.group = strided, 4 * inner // outer
        self.conv = nn.Conv2d(inner, outer if strided else outer // 4, 3, stride=1 + strided, padding=1)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        image = x.permute(0, 3, 1, 2)
        h = self.conv(image) if self.strided else F.pixel_unshuffle(self.conv(image), 2)
        return (h + F.pixel_unshuffle(image, 2).unflatten(1, (-1, self.group)).mean(2)).permute(0, 2, 3, 1)


def blocks(config: DCConfig, level: int) -> list[nn.Module]:
    """Return the blocks of a level between its changes of size."""
    width, depth = config.channels[level], config.depths[level]
    if config.attentive[level]:
        return [AttentiveBlock(width, config.head_dim, config.scales[level]) for _ in range(depth)]
    return [ResBlock(width) for _ in range(depth)]


def run(levels: Iterable[Iterable[Any]], x: Tensor, ops: OpTable) -> Tensor:
    for level in levels:
        for layer in level:
            x = layer(x, ops)
    return x


class Encoder(nn.Module):
    def __init__(self, config: DCConfig) -> None:
        super().__init__()
        channels, last = config.channels, len(config.channels) - 1
        self.split = config.local_levels
        self.group = channels[-1] // config.latent_channels
        self.conv_in = nn.Conv2d(config.out_channels, channels[0], 3, padding=1)
        self.down_blocks: ModuleList[ModuleList[Any]] = ModuleList()
        for i in range(len(channels)):
            down = [] if i == last else [Downsample(channels[i], channels[i + 1], config.strided)]
            self.down_blocks.append(ModuleList([*blocks(config, i), *down]))
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def head(self, image: Tensor, ops: OpTable) -> Tensor:
        x = self.conv_in(image).permute(0, 2, 3, 1)
        return run(self.down_blocks[: self.split], x, ops).permute(0, 3, 1, 2)

    def trunk(self, features: Tensor, ops: OpTable) -> Tensor:
        x = run(self.down_blocks[self.split :], features.permute(0, 2, 3, 1), ops).permute(0, 3, 1, 2)
        return self.conv_out(x) + x.unflatten(1, (-1, self.group)).mean(2)


class Decoder(nn.Module):
    def __init__(self, config: DCConfig) -> None:
        super().__init__()
        channels, last = config.channels, len(config.channels) - 1
        self.split = config.local_levels
        self.repeats = channels[-1] // config.latent_channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.up_blocks: ModuleList[ModuleList[Any]] = ModuleList()
        for i, width in enumerate(channels):
            up = [] if i == last else [Upsample(channels[i + 1], width, config.interpolate)]
            self.up_blocks.append(ModuleList([*up, *blocks(config, i)]))
        self.norm_out = Norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def trunk(self, latents: Tensor, ops: OpTable) -> Tensor:
        x = (self.conv_in(latents) + latents.repeat_interleave(self.repeats, 1)).permute(0, 2, 3, 1)
        return run([*self.up_blocks[self.split :]][::-1], x, ops).permute(0, 3, 1, 2)

    def tail(self, features: Tensor, ops: OpTable) -> Tensor:
        x = run([*self.up_blocks[: self.split]][::-1], features.permute(0, 2, 3, 1), ops)
        return self.conv_out(F.relu(self.norm_out(x, ops)).permute(0, 3, 1, 2))


class DCDecoder(HalvedDecoder):
    """The decoder of an AutoencoderDC."""

    def __init__(self, config: DCConfig) -> None:
        super().__init__(config, Decoder(config), config.local_convs, None)


class DCEncoder(HalvedEncoder):
    """The encoder of an AutoencoderDC."""

    def __init__(self, config: DCConfig) -> None:
        super().__init__(config, Encoder(config), config.local_convs, None)


ENCODER = Architecture(
    DCEncoderConfig, DCEncoder, lambda config: Layout(FUSED, ("decoder.",), float32_where(".norm"), no_encoder)
)
MODEL = Architecture(
    DCConfig, DCDecoder, lambda config: Layout(FUSED, ("encoder.",), float32_where(".norm")), encoder=ENCODER
)
