"""The halves of an AutoencoderKLQwenImage (diffusers) for one frame, in two dimensions.

That VAE is made for video: its convolutions are causal in time, padded with zeros before the first frame. For a single
frame every temporal tap but the last meets those zeros, so

    conv3d(x, W) = conv2d(x, W[:, :, -1])

and resampling in time does not happen at all (its convolutions act from the second frame on). Nothing is approximated;
3 x 3 x 3 kernels lose two thirds of their work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ...ops import OpTable
from ..architecture import Architecture
from ..layers import ModuleDict, UpsampleConv
from .decoder import HalvedDecoder, HalvedEncoder, LevelsDecoder, LevelsEncoder, Resnet, halved, no_encoder


@dataclass(frozen=True)
class QwenAutoencoderConfig:
    """The fields of vae/config.json that are needed."""

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
        return tuple((1.0 / torch.tensor(self.latents_std, dtype=torch.float32)).tolist())


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


class Upsample(nn.Module):
    """Twice the size, half the channels; the convolution is number 1 of a sequence in the checkpoint."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resample = ModuleDict({"1": UpsampleConv(channels, channels // 2)})

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.resample["1"].enlarged(x, ops)


class Downsample(nn.Module):
    """Half the size; the convolution is number 1 of a sequence in the checkpoint."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resample = ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return halved(self.resample["1"], x)


class QwenAutoencoderEncoder(HalvedEncoder):
    """The encoder of an AutoencoderKLQwenImage, for one frame: its levels follow each other in one list."""

    def __init__(self, config: QwenAutoencoderConfig) -> None:
        outer, depth = [config.base_dim * m for m in config.dim_mult], config.num_res_blocks
        blocks: list[nn.Module] = []
        for i, channels in enumerate(outer):
            first = outer[i - 1] if i else config.base_dim
            blocks += [Resnet(channels if j else first, channels, Norm) for j in range(depth)]
            blocks += [Downsample(channels)] * (i + 1 < len(outer))
        last, moments = outer[-1], 2 * config.z_dim
        encoder = LevelsEncoder(blocks, config.base_dim, last, Norm, SpatialAttention(last), "norm_out", moments)
        super().__init__(config, encoder, (2 * depth,) * len(outer), nn.Conv2d(moments, moments, 1))


class QwenAutoencoderDecoder(HalvedDecoder):
    """The decoder of an AutoencoderKLQwenImage, for one frame."""

    def __init__(self, config: QwenAutoencoderConfig) -> None:
        outer, depth = [config.base_dim * m for m in config.dim_mult[::-1]], config.num_res_blocks + 1
        inner = [outer[0], *(channels // 2 for channels in outer[:-1])]
        decoder = LevelsDecoder(
            config.z_dim, list(zip(inner, outer, strict=True)), depth, Norm, SpatialAttention(outer[0]), Upsample,
            "norm_out", 3,
        )  # fmt: skip
        super().__init__(config, decoder, (2 * depth,) * len(outer), nn.Conv2d(config.z_dim, config.z_dim, 1))


class OneFrame(Checkpoint):
    """The files of a 3D VAE as one frame sees them: kernels by their last temporal tap, gammas [C, 1, 1, 1] without
    time. Tensors that are two-dimensional already stay as they are."""

    def shape(self, name: str) -> tuple[int, ...]:
        shape = super().shape(name)
        return shape[:2] + shape[3:] if _in_time(name, len(shape)) else shape

    def get(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        tensor = super().get(name)
        if _in_time(name, tensor.ndim):
            tensor = tensor[:, :, -1]
        return tensor.to(device, dtype or tensor.dtype, copy=True)


def _in_time(name: str, ndim: int) -> bool:
    return ndim == 5 or (ndim == 4 and name.endswith(".gamma"))


def _layout(config: QwenAutoencoderConfig) -> Layout:
    time = (f"decoder.up_blocks.{i}.upsamplers.0.time_conv." for i, up in enumerate(config.temporal_upsample) if up)
    return Layout(unused=("encoder.", "quant_conv.", *time), dtype_of=float32_where(".gamma"))


def _encoder_layout(config: QwenAutoencoderConfig) -> Layout:
    places = ((i + 1) * (config.num_res_blocks + 1) - 1 for i in range(len(config.temporal_upsample)))
    down = zip(places, config.temporal_upsample[::-1], strict=True)
    time = (f"encoder.down_blocks.{place}.time_conv." for place, also in down if also)
    return Layout(unused=("decoder.", "post_quant_conv.", *time), dtype_of=float32_where(".gamma"), absent=no_encoder)


ENCODER = Architecture(QwenAutoencoderConfig, QwenAutoencoderEncoder, _encoder_layout, read=OneFrame)
MODEL = Architecture(QwenAutoencoderConfig, QwenAutoencoderDecoder, _layout, read=OneFrame, encoder=ENCODER)
