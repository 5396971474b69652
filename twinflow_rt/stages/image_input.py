"""Pictures as input: what callers give becomes pixels of one size, checked; what is no picture is an error by name.

    image     a path, a file's bytes, a PIL picture, uint8 [H, W], [H, W, 3] or [H, W, 4] of numpy, or float [3, H, W]
              in [0, 1] of torch; or several: a list, or [B, ...]. EXIF orientation is applied, transparency is put on
              white.
    mask      the same with one channel (float [1, H, W] or [H, W]), of the image's size: white is painted anew, black
              is kept. Of a mask with transparent pixels these are painted anew, whatever their colour.

Pictures are resized by Lanczos' filter where another size is asked for, as by diffusers' VaeImageProcessor (which takes
the nearest pixels of tensors; here they are interpolated). The default size is the first picture's, its sides rounded
down to what the model makes. Masks are cut at a half.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import SizeRule, check_path, number, shown
from ..errors import ConfigError

STRENGTH = 0.6  # where a call names none, as in diffusers
MAX_SIDE = 16_384  # pixels


@dataclass(frozen=True)
class ImageInput:
    """The pictures of a call. pixels: float32 [N, 3, H, W] in [0, 1], on the CPU. numbers: of each image of the call,
    its picture. mask: bool [images, 1, H, W], true where an image is painted anew; None: everywhere. strength:
    where on the schedule sampling starts, see `sampling.schedule.started`."""

    pixels: Tensor
    numbers: tuple[int, ...]
    mask: Tensor | None
    strength: float

    def latent_mask(self, scale: int) -> Tensor | None:
        """Return the mask for latents of `scale` pixels: a latent has its first pixel's value, as in diffusers."""
        return None if self.mask is None else self.mask[:, :, ::scale, ::scale]

    def keep(self, images: Tensor) -> Tensor:
        """Return the call's images, uint8 [B, H, W, 3] or float [B, 3, H, W] in [-1, 1], with their pictures' own
        pixels, unchanged, where they are not painted anew."""
        if self.mask is None:
            return images
        given, mask = (x.to(images.device) for x in (self.pixels[list(self.numbers)], self.mask))
        if images.dtype == torch.uint8:
            return torch.where(mask.movedim(1, -1), images, (given * 255).round().byte().movedim(1, -1))
        return torch.where(mask, images.float(), given * 2 - 1)


def resolve_images(
    image: Any, mask: Any, strength: Any, prompts: int, repeats: int, sizes: SizeRule,
    size: tuple[int | None, int | None],
) -> tuple[ImageInput | None, tuple[int, int]]:  # fmt: skip
    """Return a call's pictures, None where there are none, and height and width of its images.

    prompts, repeats: the call makes `repeats` images of each prompt; there is a picture (and a mask) for all, for each
    prompt, or for each image. size: height and width as asked for. Raises ConfigError."""
    start = resolve_strength(image, mask, strength)
    if image is None:
        return None, sizes.resolve(*size)
    pictures = read_pictures("image", image)
    numbers = _numbers("image", len(pictures), prompts, repeats)
    resolved = _size(extent(pictures[0]), sizes, size)
    painted = None
    if mask is not None:
        masks = read_pictures("mask", mask)
        of_image = _numbers("mask", len(masks), prompts, repeats)
        for own, other in {(extent(masks[m]), extent(pictures[k])) for m, k in zip(of_image, numbers, strict=True)}:
            if own != other:
                raise ConfigError(f"mask has {_text(own)} pixels, its image {_text(other)}: give one of the same size")
        painted = (torch.stack([_resized(one, resolved) for one in masks]) >= 0.5)[list(of_image)]
    pixels = torch.stack([_resized(picture, resolved) for picture in pictures])
    return ImageInput(pixels, numbers, painted, start), resolved


def arguments(pictures: Sequence[ImageInput]) -> dict[str, Any]:
    """Return how a pipeline is told to start from pictures of calls with one image each, of one size and strength, all
    with a mask or none; nothing where there are none."""
    if not pictures:
        return {}
    masks = [picture.mask for picture in pictures if picture.mask is not None]
    pixels = torch.cat([picture.pixels for picture in pictures])
    return {"image": pixels, "mask": torch.cat(masks) if masks else None, "strength": pictures[0].strength}


def transparent(picture: Any) -> bool:
    """Return whether a PIL picture has pixels that are not opaque."""
    alpha = "A" in picture.getbands() or "transparency" in picture.info
    return alpha and picture.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def resolve_strength(image: Any, mask: Any, strength: Any) -> float:
    """Return the strength of a call. Raises ConfigError, also for what goes with a picture where there is none."""
    for name, value in (("mask", mask), ("strength", strength)):
        if image is None and value is not None:
            raise ConfigError(f"{name}= goes with image=: give the picture to start from, or leave it out")
    start = STRENGTH if strength is None else number(strength)
    if start is None or not 0 < start <= 1:
        raise ConfigError(f"strength must be a number above 0, 1 at most; got {shown(strength)}")
    return start


def extent(picture: Any) -> tuple[int, int]:
    """Return height and width of a picture as `read_pictures` returns it."""
    return (picture.shape[1], picture.shape[2]) if isinstance(picture, Tensor) else (picture.height, picture.width)


def _text(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _size(own: tuple[int, int], sizes: SizeRule, asked: tuple[int | None, int | None]) -> tuple[int, int]:
    """Return the size that is asked for, by default the picture's own rounded down."""
    if min(own) < sizes.multiple:
        raise ConfigError(f"image has {_text(own)} pixels; a side must have {sizes.multiple}: give a larger one")
    height, width = (side - side % sizes.multiple if one is None else one for side, one in zip(own, asked, strict=True))
    if (asked[0] is None and height > sizes.max_height) or (asked[1] is None and width > sizes.max_width):
        most = _text((sizes.max_height, sizes.max_width))
        raise ConfigError(f"image has {_text(own)} pixels, this model makes {most} at most: give height= and width=")
    return sizes.resolve(height, width)


def _numbers(name: str, count: int, prompts: int, repeats: int) -> tuple[int, ...]:
    """Return, for each image of a call, the number of its picture of `count`."""
    images = prompts * repeats
    if count not in (1, prompts, images):
        raise ConfigError(
            f"{name}= has {count} pictures, and {prompts} prompt(s) make {images} image(s): give one for all, one for "
            "each prompt or one for each image"
        )
    return tuple(0 if count == 1 else k if count == images else k // repeats for k in range(images))


def read_pictures(name: str, value: Any) -> list[Any]:
    """Return pictures, or (name "mask") masks: each a PIL picture in mode RGB or L, or a float32 tensor [3 or 1, H, W]
    in [0, 1]. Raises ConfigError."""
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 4:
        value = list(value)
    some = list(value) if isinstance(value, (list, tuple)) else [value]
    if not some:
        raise ConfigError(f"{name} is an empty list: give a picture, or leave it out")
    return [_of_tensor(name, one) if isinstance(one, Tensor) else _of_picture(name, one) for one in some]


def _of_picture(name: str, value: Any) -> Any:
    """Return a path's, an array's or a PIL picture upright and on white; or a mask."""
    from PIL import Image

    if path := isinstance(value, (str, os.PathLike)):
        value = check_path(name, value)
    with decoding(f"{name} {shown(str(value))}" if path else name):
        if isinstance(value, np.ndarray):
            value = value.astype(np.uint8) * 255 if value.dtype == bool else value
            if value.dtype != np.uint8 or value.ndim not in (2, 3) or value.shape[2:] not in ((), (1,), (3,), (4,)):
                raise ConfigError(
                    f"{name} is an array of {value.dtype} {list(value.shape)}; one must be uint8 [H, W, 3], [H, W, 4] "
                    "or [H, W]: of floats take (255 * x).round().astype('uint8')"
                )
            value = Image.fromarray(value[..., 0] if value.shape[2:] == (1,) else value)
        if path or isinstance(value, bytes):
            with Image.open(value if path else io.BytesIO(value)) as opened:
                return _upright(name, opened)
        if isinstance(value, Image.Image):
            return _upright(name, value)
    kinds = "a path, a file's bytes, a PIL picture, a uint8 array, a float tensor, or a list of them"
    raise ConfigError(f"{name} must be {kinds}; got {shown(value)}")


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Turn what PIL raises over a file into a ConfigError."""
    from PIL import Image

    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{what} cannot be read ({error!s:.150}): give a whole picture, PNG or JPEG") from None


def _upright(name: str, picture: Any) -> Any:
    from PIL import Image, ImageOps

    _check_sides(name, (picture.height, picture.width))  # before it is decoded
    if picture.mode.startswith(("I", "F")):
        raise ConfigError(f"{name} has pixels of kind {picture.mode}, not of 8 bits: convert it to RGB or L first")
    picture = ImageOps.exif_transpose(picture)
    if transparent(picture):
        picture = picture.convert("RGBA")
        if name == "mask":
            return ImageOps.invert(picture.getchannel("A"))
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if name == "mask" else "RGB")


def _of_tensor(name: str, value: Tensor) -> Tensor:
    channels = 1 if name == "mask" else 3
    picture = value[None] if name == "mask" and value.ndim == 2 else value
    picture = picture.float() if picture.dtype == torch.bool else picture
    if not picture.is_floating_point() or picture.ndim != 3 or picture.shape[0] != channels or not picture.numel():
        raise ConfigError(
            f"{name} is a tensor of {value.dtype} {list(value.shape)}; one must be floats [{channels}, H, W] in [0, 1]"
        )
    _check_sides(name, picture.shape[1:])
    picture = picture.detach().to("cpu", torch.float32)
    if not (picture.min() >= 0 and picture.max() <= 1):  # nor where there is NaN
        raise ConfigError(f"{name} is a tensor with values outside [0, 1]: of pixels in bytes give x / 255")
    return picture


def _check_sides(name: str, size: Any) -> None:
    if not 0 < min(size) <= max(size) <= MAX_SIDE:
        raise ConfigError(f"{name} has {_text(size)} pixels; a side must have 1 to {MAX_SIDE:,}: give another size")


def _resized(picture: Any, size: tuple[int, int]) -> Tensor:
    """Return float32 [C, *size] in [0, 1] of a picture as `read_pictures` returns it."""
    from PIL import Image

    if isinstance(picture, Tensor):
        same = extent(picture) == size
        return picture if same else F.interpolate(picture[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)  # a copy, where it has that size
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
