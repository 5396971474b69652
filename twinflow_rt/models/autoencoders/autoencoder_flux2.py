"""The halves of an AutoencoderKLFlux2 (diffusers): those of an AutoencoderKL, whose latents the model sees as patches
of 2x2, each of their channels normalised by the running statistics of a batch norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ..architecture import Architecture
from .autoencoder_kl import AutoencoderConfig, AutoencoderDecoder, AutoencoderEncoder
from .decoder import no_encoder

PATCH = 2
DEFAULTS = {  # diffusers'
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 32, "sample_size": 1024,
    "batch_norm_eps": 1e-4, "patch_size": (PATCH, PATCH), "decoder_block_out_channels": None,
}  # fmt: skip


@dataclass(frozen=True)
class Flux2AutoencoderConfig(AutoencoderConfig):
    """The fields of vae/config.json that are needed. latent_channels: of a patch. eps: of the batch norm."""

    eps: float

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Flux2AutoencoderConfig:
        """Build from config.json's content, with diffusers' defaults. Raises ConfigError for other kinds."""
        if (name := raw.get("_class_name", "AutoencoderKLFlux2")) != "AutoencoderKLFlux2":
            raise ConfigError(f"vae/config.json says _class_name {name!r}; FLUX.2's VAE is an AutoencoderKLFlux2")
        given = {**DEFAULTS, **raw, "_class_name": "AutoencoderKL"}
        wide = given["decoder_block_out_channels"]
        if tuple(given["patch_size"]) != (PATCH, PATCH) or wide not in (None, given["block_out_channels"]):
            raise ConfigError(
                f"vae/config.json has patch_size {given['patch_size']}, decoder_block_out_channels {wide}: FLUX.2's "
                "VAE has patches of 2x2, and a decoder as wide as its encoder"
            )
        fields = vars(AutoencoderConfig.from_dict(given))
        return cls(**fields | {"latent_channels": PATCH**2 * fields["latent_channels"]}, eps=given["batch_norm_eps"])

    @property
    def inner_channels(self) -> int:
        return self.latent_channels // PATCH**2

    @property
    def scale(self) -> int:
        return PATCH * super().scale


class Statistics(nn.Module):
    """The running statistics of a batch norm. Patches are (raw - offset) * divisor."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, config: Flux2AutoencoderConfig) -> None:
        super().__init__()
        self.eps = config.eps
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(config.latent_channels))

    @property
    def offset(self) -> Tensor:
        return self.running_mean

    @property
    def divisor(self) -> Tensor:
        return (self.running_var + self.eps).rsqrt()


class Normalised(nn.Module):
    """What both halves have: `bn`, the statistics of patches."""

    def __init__(self, config: Flux2AutoencoderConfig) -> None:
        super().__init__(config)
        self.bn = Statistics(config)

    @property
    def statistics(self) -> Statistics:
        return self.bn


class Flux2Encoder(Normalised, AutoencoderEncoder):
    def trunk(self, features: Tensor) -> Tensor:
        """Return the mean of the patches of these features, [B, 4C, h/2, w/2]."""
        return F.pixel_unshuffle(super().trunk(features).chunk(2, 1)[0], PATCH)


class Flux2Decoder(Normalised, AutoencoderDecoder):
    def trunk(self, latents: Tensor) -> Tensor:
        return super().trunk(F.pixel_shuffle(latents, PATCH))


def _layout(*unused: str, encoder: bool = False) -> Layout:
    absent = no_encoder if encoder else Layout().absent
    return Layout(unused=(*unused, "bn.num_batches_tracked"), dtype_of=float32_where("bn."), absent=absent)


ENCODER = Architecture(
    Flux2AutoencoderConfig, Flux2Encoder, lambda config: _layout("decoder.", "post_quant_conv.", encoder=True)
)
MODEL = Architecture(
    Flux2AutoencoderConfig, Flux2Decoder, lambda config: _layout("encoder.", "quant_conv."), encoder=ENCODER
)
