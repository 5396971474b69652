"""The velocity as a network's last layer leaves it: patches of tokens, in whatever order a token has."""

from __future__ import annotations

from torch import Tensor


def channels_first(tokens: Tensor, height: int, width: int, size: int) -> Tensor:
    """[B, height*width, C*size*size], features ordered (channel, row, column), as [B, C, height, size, width, size]:
    a view, what `ops.x0_to_vae` reads."""
    return tokens.unflatten(1, (height, width)).unflatten(-1, (-1, size, size)).permute(0, 3, 1, 4, 2, 5)


def channels_last(tokens: Tensor, height: int, width: int, size: int) -> Tensor:
    """The same for features ordered (row, column, channel)."""
    return tokens.unflatten(1, (height, width)).unflatten(-1, (size, size, -1)).permute(0, 5, 1, 3, 2, 4)


def joined(patches: Tensor, sign: float) -> Tensor:
    """sign * the image [B, C, H, W] of patches [B, C, H/p, p, W/p, p]."""
    image = patches.flatten(4, 5).flatten(2, 3)
    return image if sign == 1 else sign * image
