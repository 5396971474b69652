"""The last stage: normalised latents to pixels. The encoder is never loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .models.autoencoder_kl import AutoencoderConfig, AutoencoderDecoder
from .ops import EAGER
from .passes.load import Checkpoint, Layout, LoadReport, Progress, materialize

LAYOUT = Layout(unused=("encoder.", "quant_conv."))


class VaeDecoder:
    """Decodes x0, normalised as z = (raw - shift_factor) * scaling_factor."""

    def __init__(self, network: AutoencoderDecoder) -> None:
        self.network, self.config, self.ops = network, network.config, EAGER

    @classmethod
    def load(
        cls, folder: Path, device: torch.device, dtype: torch.dtype, progress: Progress | None = None
    ) -> tuple[VaeDecoder, LoadReport]:
        """Reads the decoder of `folder` (config.json + safetensors); convolutions in channels-last order."""
        checkpoint = Checkpoint(folder)
        with torch.device("meta"):
            network = AutoencoderDecoder(AutoencoderConfig.from_dict(checkpoint.config))
        report = materialize(network, checkpoint, LAYOUT, device, dtype, progress)
        return cls(network.to(memory_format=torch.channels_last)), report

    @property
    def scale(self) -> int:
        """Pixels per latent along each axis."""
        return self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] -> float images [B, 3, h*scale, w*scale], nominally in [-1, 1].

        Denormalised in float32, then computed in the weights' dtype, which the result has.
        """
        raw = latents.float() / self.config.scaling_factor + self.config.shift_factor
        dtype = self.network.decoder.conv_in.weight.dtype
        return self.network(raw.to(dtype).contiguous(memory_format=torch.channels_last))

    def decode_uint8(self, latents: Tensor) -> Tensor:
        """Normalised latents -> uint8 pixels [B, H, W, 3]."""
        return self.ops.to_uint8(self.decode(latents))
