"""The decoder half of an AutoencoderKLQwenImage (diffusers) for one frame, in two dimensions.

That VAE is made for video: its convolutions are causal in time, padded with zeros before the first frame. For a single
frame every temporal tap but the last meets those zeros, so

    conv3d(x, W) = conv2d(x, W[:, :, -1])

and upsampling in time does not happen at all (its convolutions act from the second frame on). Nothing is approximated;
3 x 3 x 3 kernels lose two thirds of their work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.layout import Layout
from ...errors import ConfigError
from ...ops import EAGER, OpTable
from ..architecture import Architecture
from ..layers import ModuleDict, UpsampleConv, conv_residual


@dataclass(frozen=True)
class QwenAutoencoderConfig:
    """The fields of vae/config.json that the decoder needs."""

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_upsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> QwenAutoencoderConfig:
        """Build from config.json's content. Raises ConfigError where a field is missing: diffusers writes every one."""
        name = raw.get("_class_name")
        if name != "AutoencoderKLQwenImage":
            raise ConfigError(f"vae/config.json says _class_name {name!r}; Qwen-Image has an AutoencoderKLQwenImage")
        if raw.get("input_channels", 3) != 3:
            raise ConfigError(f"vae/config.json: {raw['input_channels']} image channels; only RGB is supported")
        try:
            config = cls(
                raw["base_dim"], raw["z_dim"], tuple(raw["dim_mult"]), raw["num_res_blocks"],
                tuple(raw["temperal_downsample"])[::-1], tuple(raw["latents_mean"]), tuple(raw["latents_std"]),
            )  # fmt: skip
        except KeyError as error:
            raise ConfigError(f"vae/config.json lacks {error}; download it again") from None
        if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
            raise ConfigError(f"vae/config.json: latents_mean and latents_std must have z_dim = {config.z_dim} entries")
        if len(config.temporal_upsample) != len(config.dim_mult) - 1:
            raise ConfigError("vae/config.json: temperal_downsample must have one entry less than dim_mult")
        return config

    @property
    def scale(self) -> int:
        """Pixels per latent, along each axis."""
        return 1 << (len(self.dim_mult) - 1)

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    @property
    def offset(self) -> tuple[float, ...]:
        """Normalised latents are (raw - offset) * divisor, per channel."""
        return self.latents_mean

    @property
    def divisor(self) -> tuple[float, ...]:
        """1 / std in float32, as the reference has it."""
        return tuple((1.0 / torch.tensor(self.latents_std)).tolist())


class Norm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the channels: an RMS norm, all but without epsilon."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.eps = nn.Parameter(torch.empty(channels, 1, 1)), 1e-24 / channels

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).contiguous()  # already so where memory is channels-last
        return ops.rms_norm(pixels, self.gamma.flatten(), self.eps).permute(0, 3, 1, 2)

    def silu(self, x: Tensor, ops: OpTable) -> Tensor:
        """Return SiLU of the norm."""
        return ops.rms_norm_silu(x, self.gamma.flatten(), self.eps)


class Resnet(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(inner), Norm(outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        h = self.conv1(self.norm1.silu(x, ops))
        h = self.norm2.silu(h, ops)
        return conv_residual(x if self.conv_shortcut is None else self.conv_shortcut(x), self.conv2, h)


class SpatialAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x, ops)).flatten(2).transpose(1, 2)[:, None].contiguous().chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return self.proj(out).add_(x)


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels)])

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, ops), ops), ops)


class Upsample(nn.Module):
    """Twice the size, half the channels; the convolution is number 1 of a sequence in the checkpoint."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resample = ModuleDict({"1": UpsampleConv(channels, channels // 2)})

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.resample["1"].enlarged(x, ops)


class UpBlock(nn.Module):
    def __init__(self, inner: int, outer: int, depth: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(inner if i == 0 else outer, outer) for i in range(depth))
        self.upsamplers = nn.ModuleList([Upsample(outer)] if upsample else [])

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, ops)
        for upsampler in self.upsamplers:
            x = upsampler(x, ops)
        return x


class Decoder(nn.Module):
    def __init__(self, config: QwenAutoencoderConfig) -> None:
        super().__init__()
        outer = [config.base_dim * m for m in config.dim_mult[::-1]]
        inner = [outer[0], *(channels // 2 for channels in outer[:-1])]
        self.conv_in = nn.Conv2d(config.z_dim, outer[0], 3, padding=1)
        self.mid_block = MidBlock(outer[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(a, b, config.num_res_blocks + 1, upsample=i + 1 < len(outer))
            for i, (a, b) in enumerate(zip(inner, outer, strict=True))
        )
        self.norm_out = Norm(outer[-1])
        self.conv_out = nn.Conv2d(outer[-1], 3, 3, padding=1)

    def trunk(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.mid_block(self.conv_in(x), ops)

    def tail(self, x: Tensor, ops: OpTable) -> Tensor:
        for block in self.up_blocks:
            x = block(x, ops)
        return self.conv_out(self.norm_out.silu(x, ops))


class QwenAutoencoderDecoder(nn.Module):
    """Raw latents [B, z_dim, h, w] to images [B, 3, h*scale, w*scale], nominally in [-1, 1]."""

    def __init__(self, config: QwenAutoencoderConfig) -> None:
        super().__init__()
        self.config, self.ops = config, EAGER
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    @property
    def tail_convs(self) -> tuple[int, ...]:
        """3x3 convolutions that follow each other on every level of `tail`, coarsest first (see `tiles`)."""
        return (2 * (self.config.num_res_blocks + 1),) * len(self.config.dim_mult)

    def trunk(self, latents: Tensor) -> Tensor:
        """Return the features that must see all positions, through the attention, at the latents' resolution."""
        return self.decoder.trunk(self.post_quant_conv(latents), self.ops)

    def tail(self, features: Tensor) -> Tensor:
        """Return the image of these features; a pixel depends on those nearby alone."""
        return self.decoder.tail(features, self.ops)

    def forward(self, latents: Tensor) -> Tensor:
        return self.tail(self.trunk(latents))


class OneFrame(Checkpoint):
    """The files of a 3D VAE as one frame sees them: kernels by their last temporal tap, gammas [C, 1, 1, 1] without
    time. Tensors that are two-dimensional already stay as they are."""

    def shape(self, name: str) -> tuple[int, ...]:
        return one_frame(name, super().shape(name))

    def nbytes(self, name: str) -> int:
        """Return the bytes in the file, of all taps."""
        return math.prod(super().shape(name)) * self.dtype(name).itemsize

    def get(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        tensor = super().get(name)
        if _in_time(name, tensor.ndim):
            tensor = tensor[:, :, -1]
        return tensor.to(device, dtype or tensor.dtype, copy=True)


def one_frame(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor without time."""
    return shape[:2] + shape[3:] if _in_time(name, len(shape)) else shape


def _in_time(name: str, ndim: int) -> bool:
    return ndim == 5 or (ndim == 4 and name.endswith(".gamma"))


def _layout(config: QwenAutoencoderConfig) -> Layout:
    time = (f"decoder.up_blocks.{i}.upsamplers.0.time_conv." for i, up in enumerate(config.temporal_upsample) if up)
    return Layout(unused=("encoder.", "quant_conv.", *time), dtype_of=_dtype_of)


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(".gamma") else dtype


MODEL = Architecture(QwenAutoencoderConfig, QwenAutoencoderDecoder, _layout, read=OneFrame, shape=one_frame)
