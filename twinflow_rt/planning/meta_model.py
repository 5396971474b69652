"""A model without weights, on the meta device, where its stages run to be counted: nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..models.context import Context
from ..models.meta_device import meta_device
from ..ops import EAGER, OpTable
from ..ops.selection import Choice
from ..passes.convolutions import fold_upsampling
from ..stages.text import PromptEmbeds, TextStage
from ..stages.vae import VaeDecoder

FOLDED = (Choice("upsample_conv", "folded"),)  # as decoders are on every device


@dataclass(frozen=True)
class MetaModel:
    """The networks of a model as a pipeline would call them.

    text: the model's text stage, which runs `encoders` in place of its own networks. network: the velocity network,
    folded, for one evaluation unless it is so for more. decoder: the VAE's. latents: [images, C, h, w]. Everything is float32."""

    text: TextStage
    encoders: Sequence[Any]
    network: Any
    decoder: Any
    latents: Tensor

    @classmethod
    def of(
        cls, text: TextStage, network: Any, vae: VaeDecoder, size: tuple[int, int], images: int = 1,
        ops: OpTable = EAGER,
    ) -> Self:  # fmt: skip
        """Return the copy of a model's stages, loaded or not, for `images` images of size (height, width) in pixels.
        ops: such that run on the meta device."""
        with meta_device():
            copy = type(network)(network.config, folded_steps=network.folded_steps or 1)
            latents = torch.zeros(images, vae.channels, size[0] // vae.scale, size[1] // vae.scale)
        copy.ops, decoder = ops, vae.parts[0].meta_network(ops)
        fold_upsampling(decoder, FOLDED)
        return cls(text, text.meta_networks(ops), copy, decoder, latents)

    def prompt(self, tokens: int) -> PromptEmbeds:
        """Do the text stage's work for one prompt of so many tokens."""
        return self.text.probe(tokens, self.encoders)

    def encode(self, prompt: PromptEmbeds) -> Context:
        """Do the network's work for the prompt alone."""
        context: Context = self.network.encode_context(prompt.embeds, prompt.lengths, **prompt.extras)
        return context

    def velocity(self, context: Context) -> Tensor:
        """Do one evaluation, with a context per image."""
        velocity: Tensor = self.network(self.latents, self.network.step_modulation(0), context)
        return velocity

    def decode(self) -> Tensor:
        """Do the decoder's work."""
        image: Tensor = self.decoder(self.latents)
        return image
