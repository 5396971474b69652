"""What a call returns: its images as they were asked for, which save and show themselves."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.image_files import grid, output_paths, save_image
from ..config import check_path
from ..errors import ConfigError


class Truncated(tuple[bool, ...]):
    """A boolean per image, itself true if any is."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return any(self)


@dataclass(frozen=True, repr=False)
class Result:
    """What a call made: iterating, indexing and len() are those of `images`; notebooks show them.

    images: one per (prompt, repeat), prompt-major, as `output` says. seeds: image k's own. timings: seconds of each
    stage (text, noise, encode, sample, decode, output) and in total. memory: peak bytes of each, of the device, on a
    CPU of the process. at_once: the most images that went through a network together. truncated: of each image whether
    its prompt is longer than the model reads (a PromptTruncatedWarning said what was lost); the whole is true if any
    is."""

    images: Any
    seeds: list[int]
    timings: dict[str, float]
    memory: dict[str, int]
    at_once: int = 0
    output: str = "pil"
    truncated: Truncated = field(default_factory=Truncated)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: Any) -> Any:
        return self.images[k]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.images)

    def __repr__(self) -> str:
        seeds = ", ".join(map(str, self.seeds[:4])) + ", ..." * (len(self.seeds) > 4)
        return f"Result({len(self)} of output {self.output!r}, seeds {seeds}, {self.timings.get('total', 0):.2f} s)"

    def save(self, path: str | Path) -> list[Path]:
        """Write the images, and return the files: `path` (.png, .jpg or .webp), or for several NAME-0, NAME-1, ... and
        a sheet of all, NAME-grid. PNG files say their seed. Raises ConfigError for latents, and where nothing can be
        written."""
        images = self._pictures()
        files = output_paths(Path(check_path("path", path)), len(images), "path")
        for file, image, seed in zip(files, images, self.seeds, strict=False):
            save_image(image, file, {"seed": seed})
        if len(files) > len(images):
            save_image(grid(images), files[-1])
        return files

    def _pictures(self) -> list[Any]:
        """Return the images as PIL's. Raises ConfigError for latents."""
        if self.output == "latent":
            raise ConfigError("latents are no images: call the pipeline with output='pil', 'np' or 'pt'")
        if self.output == "pt":
            return pil((self.images.movedim(1, -1) * 255).round().byte().cpu().numpy())
        return pil(self.images) if self.output == "np" else list(self.images)

    def _repr_png_(self) -> bytes | None:
        """Return what notebooks show: the image, or a sheet of all; None for latents."""
        try:
            images = self._pictures()
        except ConfigError:
            return None
        file = BytesIO()
        (grid(images) if len(images) > 1 else images[0]).save(file, format="PNG")
        return file.getvalue()

    def _repr_html_(self) -> str | None:
        """Return the same as HTML, with the seeds below."""
        if (png := self._repr_png_()) is None:
            return None
        picture = f'<img src="data:image/png;base64,{b64encode(png).decode()}">'
        return f"<figure>{picture}<figcaption>{escape(repr(self))}</figcaption></figure>"


def deliver(images: Tensor, output: str) -> Any:
    """Return decoded images as a call's `output` asks for them."""
    if output == "pt":
        return (images.float() / 2 + 0.5).clamp(0, 1)
    array = images.cpu().numpy()
    return array if output == "np" else pil(array)


def pil(array: Any) -> list[Any]:
    """Return the PIL images of uint8 [B, H, W, 3]."""
    from PIL import Image

    return [Image.fromarray(a) for a in array]
