"""What autoencoders share: the halves that `stages.tiles` cuts them into, and the levels of the KL autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import EAGER, OpTable
from ..layers import conv_residual


class ScaledLatents:
    """Of configs: normalised latents are (raw - offset) * divisor."""

    scaling_factor: float
    shift_factor: float

    @property
    def offset(self) -> float:
        return self.shift_factor

    @property
    def divisor(self) -> float:
        return self.scaling_factor


class HalvedDecoder(nn.Module):
    """Raw latents [B, C, h, w] to images [B, 3, h*scale, w*scale], nominally in [-1, 1], by way of features.

    decoder: has `trunk(latents, ops)` and `tail(features, ops)`. convs: 3x3 convolutions that follow each other on
    every level of `tail`, coarsest first. post_quant: a convolution of the latents that comes first, or None.
    """

    def __init__(self, config: Any, decoder: nn.Module, convs: tuple[int, ...], post_quant: nn.Module | None) -> None:
        super().__init__()
        self.config, self.ops, self.decoder, self.post_quant_conv = config, EAGER, decoder, post_quant
        self.convs = convs

    def trunk(self, latents: Tensor) -> Tensor:
        """Return the features that must see all positions, through the last attention."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder.trunk(latents, self.ops)  # type: ignore[operator]

    def tail(self, features: Tensor) -> Tensor:
        """Return the image of these features; a pixel depends on those nearby, and on all by group norms if any."""
        return self.decoder.tail(features, self.ops)  # type: ignore[operator]

    def forward(self, latents: Tensor) -> Tensor:
        return self.tail(self.trunk(latents))


def no_encoder(missing: set[str]) -> str | None:
    """`Layout.absent` of an encoder."""
    if not any(name == "encoder.conv_in.weight" for name in missing):
        return None
    return "there is no encoder in this VAE's files, so pictures are not taken: load a folder whose vae has both halves"


class HalvedEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to raw latents [B, C, H/scale, W/scale], or to their mean and log variance [B, 2C,
    ...], by way of features.

    encoder: has `head(image, ops)` and `trunk(features, ops)`. convs: 3x3 convolutions that follow each other on every
    level of `head`, coarsest first. quant: a convolution of the result that comes last, or None.
    """

    def __init__(self, config: Any, encoder: nn.Module, convs: tuple[int, ...], quant: nn.Module | None) -> None:
        super().__init__()
        self.config, self.ops, self.encoder, self.quant_conv = config, EAGER, encoder, quant
        self.convs = convs

    def head(self, image: Tensor) -> Tensor:
        """Return the features before the first attention; they depend on pixels nearby, and on all by group norms."""
        return self.encoder.head(image, self.ops)  # type: ignore[operator]

    def trunk(self, features: Tensor) -> Tensor:
        """Return the latents of these features."""
        moments: Tensor = self.encoder.trunk(features, self.ops)  # type: ignore[operator]
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def forward(self, image: Tensor) -> Tensor:
        return self.trunk(self.head(image))


class Resnet(nn.Module):
    """Two 3x3 convolutions behind a norm with SiLU each, and a shortcut. norm(channels): has `silu(x, ops)`."""

    def __init__(self, inner: int, outer: int, norm: Callable[[int], Any]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(inner), norm(outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        h = self.norm2.silu(self.conv1(self.norm1.silu(x, ops)), ops)
        return conv_residual(x if self.conv_shortcut is None else self.conv_shortcut(x), self.conv2, h)


class MidBlock(nn.Module):
    """Two residual blocks, with attention over all positions between them unless it is None."""

    def __init__(self, channels: int, norm: Callable[[int], Any], attention: nn.Module | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels, norm) for _ in range(2))
        self.attentions = nn.ModuleList([] if attention is None else [attention])

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x, ops)
        return x


class Level(nn.Module):
    """Residual blocks, then what doubles or halves the size unless it is None. name: of the list it is in."""

    def __init__(
        self, inner: int, outer: int, depth: int, norm: Callable[[int], Any], resample: nn.Module | None, name: str
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(inner if i == 0 else outer, outer, norm) for i in range(depth))
        self.add_module(name, nn.ModuleList([] if resample is None else [resample]))

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        for layers in self.children():
            for layer in layers:  # type: ignore[attr-defined]
                x = layer(x, ops)
        return x


class LevelsDecoder(nn.Module):
    """conv_in and the middle block, then levels from coarse to fine.

    levels: (inner, outer) channels, coarsest first. upsample(outer): what doubles the size behind all but the last.
    norm_out: the name that the checkpoint gives the closing norm.
    """

    def __init__(
        self, latents: int, levels: list[tuple[int, int]], depth: int, norm: Callable[[int], Any],
        attention: nn.Module | None, upsample: Callable[[int], nn.Module], norm_out: str, out_channels: int,
    ) -> None:  # fmt: skip
        super().__init__()
        first, last = levels[0][0], levels[-1][1]
        self.conv_in, self._closing = nn.Conv2d(latents, first, 3, padding=1), norm_out
        self.mid_block = MidBlock(first, norm, attention)
        self.up_blocks = nn.ModuleList(
            Level(inner, outer, depth, norm, upsample(outer) if i + 1 < len(levels) else None, "upsamplers")
            for i, (inner, outer) in enumerate(levels)
        )
        self.add_module(norm_out, norm(last))
        self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)

    def trunk(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.mid_block(self.conv_in(x), ops)

    def tail(self, x: Tensor, ops: OpTable) -> Tensor:
        for block in self.up_blocks:
            x = block(x, ops)
        return self.conv_out(getattr(self, self._closing).silu(x, ops))


class LevelsEncoder(nn.Module):
    """conv_in and `down_blocks`, from fine to coarse, then the middle block and what makes `moments` channels.

    first, last: channels before and behind them. norm_out: the name that the checkpoint gives the closing norm.
    """

    def __init__(
        self, down_blocks: list[nn.Module], first: int, last: int, norm: Callable[[int], Any],
        attention: nn.Module | None, norm_out: str, moments: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_in, self._closing = nn.Conv2d(3, first, 3, padding=1), norm_out
        self.down_blocks = nn.ModuleList(down_blocks)
        self.mid_block = MidBlock(last, norm, attention)
        self.add_module(norm_out, norm(last))
        self.conv_out = nn.Conv2d(last, moments, 3, padding=1)

    def head(self, x: Tensor, ops: OpTable) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, ops)
        return x

    def trunk(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.conv_out(getattr(self, self._closing).silu(self.mid_block(x, ops), ops))


def halved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the convolution, of stride 2, of x with a row and a column of zeros below and to the right."""
    out: Tensor = layer(F.pad(x, (0, 1, 0, 1)))
    return out
