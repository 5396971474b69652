"""The last stage, normalised latents to pixels; and its mirror image, which is not read until a picture comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.checkpoint import OWN_FILES, Files
from ..checkpoint.reading import Progress
from ..errors import CheckpointError
from ..models.architecture import Architecture
from ..models.autoencoders import autoencoder_tiny
from ..ops import Target
from ..passes.convolutions import convert_convolutions
from ..passes.layer_groups import Layers
from ..runtime.finite import FiniteCheck
from ..runtime.timing import StageTimer
from ..sampling.sampler import Start
from . import tiles
from .image_input import ImageInput
from .stage import DEFAULTS, Stage, StageOptions, in_parts, open_part


class VaeHalf(Stage):
    """One half of the autoencoder `model` in `folder`. Latents are normalised, z = (raw - offset) * divisor.

    Its config has `scale` (pixels per latent along each axis), `latent_channels`, `offset` and
    `divisor` (numbers, or one per channel); a network's `statistics` have the latter two where files hold them.
    recorded_as: the name of its graphs. convolutions: what became of them, where they changed. std, mean: float32 [C],
    of raw latents: z * std + mean, as `ops.x0_to_vae` takes them.
    """

    recorded_as = ""
    convolutions: tuple[Layers, ...] = ()

    def __init__(self, folder: Path, model: Architecture, files: Files = OWN_FILES) -> None:
        self.parts, self._from = (open_part(folder, model, files),), (folder, model, files)
        self.network = self.parts[0].network
        self.config = self.network.config

    def materialize(
        self, device: torch.device, dtype: torch.dtype, options: StageOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Read the weights, as every stage does; convolutions are kept in channels-last order, or become Winograd's
        (`convolutions`)."""
        super().materialize(device, dtype, options, progress)
        self.network.to(memory_format=torch.channels_last)
        part = self.parts[0]
        read = lambda name: part.checkpoint.get(name, device, part.layout.dtype_of(name, dtype))
        self.convolutions = convert_convolutions(self.network, Target.of(device, dtype), read)
        self.device, self.dtype = device, dtype
        said = getattr(self.network, "statistics", self.config)
        self._offset, self._divisor = (
            torch.as_tensor(value, dtype=torch.float32, device=device).view(-1, 1, 1)
            for value in (said.offset, said.divisor)
        )
        each = torch.ones(self.channels, dtype=torch.float32, device=device)
        self.std, self.mean = each / self._divisor.flatten(), each * self._offset.flatten()

    def notes(self) -> tuple[str, ...]:
        return (*super().notes(), *(f"{self.parts[0].name} convolutions {group}" for group in self.convolutions))

    @property
    def scale(self) -> int:
        """Pixels per latent along each axis."""
        return self.config.scale

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.config.latent_channels

    def _run(self, x: Tensor, in_tiles: Callable[..., Tensor], check: Callable[[], None]) -> Tensor:
        """Return network(x) in the weights' dtype, whole or in tiles."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if (tile := self.options.tile) is None:
            return self.captured(self.recorded_as, self.network, x)
        call = lambda part, run, x: self.captured(f"{self.recorded_as} {part}", run, x)
        return in_tiles(self.network, x, tile, check, call)


class VaeDecoder(VaeHalf):
    """Decode x0."""

    recorded_as = "decode"

    @cached_property
    def encoder(self) -> VaeEncoder:
        """The other half: its files are opened when it is first asked for, and not read yet."""
        folder, model, files = self._from
        return VaeEncoder(folder, model.encoder or model, files)

    def stored(self) -> dict[str, Tensor]:
        """Return the weights under the checkpoint's names, those of the other half as its files have them."""
        part = self.parts[0]
        other = (name for name in part.checkpoint if name.startswith(("encoder.", "quant_conv.")))
        return part.weights() | {name: part.checkpoint.get(name) for name in other}

    def close_encoder(self) -> None:
        """Let go of the other half's weights; the next picture reads them again."""
        vars(self).pop("encoder", None)

    def decode(self, latents: Tensor, *, raw: bool = False, check: Callable[[], None] = lambda: None) -> Tensor:
        """Return the images of normalised latents [B, C, h, w]: float [B, 3, h*scale, w*scale], nominally in [-1, 1].

        Denormalised in float32, unless they are raw already, then computed in the weights' dtype, which the
        result has. check(): called before each tile, if there are tiles; it may raise.
        """
        if not raw:
            latents = latents.float() / self._divisor + self._offset
        return self._run(latents, tiles.decode, check)

    def images(
        self, latents: Tensor, output: str, at_once: int, timer: StageTimer, raw: bool, finite: FiniteCheck,
        given: ImageInput | None,
    ) -> Tensor:  # fmt: skip
        """Return the images of a call's latents, `at_once` together: uint8 [B, H, W, 3], or for output "pt" float
        [B, 3, H, W], nominally in [-1, 1]. finite: told of each part before it is rounded. given: its pictures."""

        def decode(part: Tensor, _: int) -> Tensor:
            images = self.decode(part, raw=raw, check=lambda: timer.check("before a tile of its decode stage"))
            finite.note("pixels", images)
            return images if output == "pt" else self.ops.to_uint8(images)

        images = in_parts(decode, latents, at_once, timer)
        return images if given is None else given.keep(images)

    def decode_uint8(self, latents: Tensor) -> Tensor:
        """Return the images of normalised latents [B, C, h, w]: uint8 [B, H, W, 3]."""
        return self.ops.to_uint8(self.decode(latents))

    def probe(self, height: int, width: int) -> Tensor:
        """Do the stage's work for one image on the meta device, to be counted."""
        shape = (1, self.channels, height // self.scale, width // self.scale)
        return self.parts[0].meta_network()(torch.zeros(shape, dtype=torch.float32, device="meta"))


class VaeEncoder(VaeHalf):
    """Encode pictures. Whoever calls `encode` has called `materialize` before."""

    recorded_as = "encode"

    def encode(self, images: Tensor, check: Callable[[], None] = lambda: None) -> Tensor:
        """Return the normalised latents of images [B, 3, H, W] in [-1, 1], sides in multiples of `scale`: the mean of
        what the encoder says of them, not a sample, so the same in every call. check(): see `decode`."""
        mean = self._run(images, tiles.encode, check)[:, : self.channels]
        return ((mean.float() - self._offset) * self._divisor).to(self.dtype)

    def start(self, given: ImageInput, noise: Tensor, at_once: int, timer: StageTimer) -> Start:
        """Return where the images of a call start that have pictures, `at_once` of which are encoded together."""
        check = lambda: timer.check("before a tile of its encode stage")
        pixels = given.pixels.to(self.device) * 2 - 1
        latents = in_parts(lambda part, _: self.encode(part, check), pixels, at_once, timer)
        mask = given.latent_mask(self.scale)
        return Start(latents[list(given.numbers)], noise, None if mask is None else mask.to(self.device))


class PreviewDecoder(VaeDecoder):
    """An AutoencoderTiny in a folder of its own, in the place of a model's decoder: small, fast, not exact."""

    recorded_as = "preview"

    def __init__(self, folder: Path, vae: VaeDecoder) -> None:
        super().__init__(folder, autoencoder_tiny.MODEL)
        own, theirs = (self.channels, self.scale), (vae.channels, vae.scale)
        if own != theirs:
            raise CheckpointError(
                f"{folder} decodes {own[0]} channels at {own[1]} pixels a latent, this model's VAE {theirs[0]} at "
                f"{theirs[1]}: a preview decoder of another model"
            )
