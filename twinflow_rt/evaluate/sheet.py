"""A contact sheet: images with their captions and verdicts, for looking at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigError
from ..training.scenes import Scene
from .check import Verdict, check

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, HEIGHT, SIDE = 176, 184, 128  # of a cell and of the image in it, px
GOOD, BAD, INK = (20, 120, 50), (190, 30, 30), (40, 40, 40)


def contact_sheet(
    images: Sequence[ArrayLike], scenes: Sequence[Scene], verdicts: Sequence[Verdict] | None = None, columns: int = 6
) -> Image:
    """Return a PIL image with one framed cell per image: its caption, and the verdict in green or red.

    `verdicts` are computed if not given. Raises ConfigError if the lengths differ.
    """
    from PIL import Image, ImageDraw

    if verdicts is None:
        verdicts = [check(i, s) for i, s in zip(images, scenes, strict=False)]
    if not len(images) == len(scenes) == len(verdicts) or not len(scenes):
        raise ConfigError(f"{len(images)} images, {len(scenes)} scenes, {len(verdicts)} verdicts; give one each")
    sheet = Image.new("RGB", (columns * WIDTH, -(-len(images) // columns) * HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, scene, verdict) in enumerate(zip(images, scenes, verdicts, strict=True)):
        x, y = i % columns * WIDTH + WIDTH // 2, i // columns * HEIGHT + 6
        left, color = x - SIDE // 2, GOOD if verdict.correct else BAD
        picture = Image.fromarray(np.asarray(image)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        draw.rectangle((left - 3, y - 3, left + SIDE + 2, y + SIDE + 2), fill=color)
        sheet.paste(picture, (left, y))
        draw.text((x, y + SIDE + 5), _wrap(scene.caption), INK, anchor="ma", align="center")
        draw.text((x, y + SIDE + 30), verdict.reason, color, anchor="ma")
    return sheet


def _wrap(caption: str, width: int = 28) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(caption, width))
