"""Images to files: names, formats, what a PNG says about itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .atomic import check_target, is_stream, replacing

CHUNK = "twinflow_rt"  # the text chunk in which a PNG file says what it was made of
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def output_paths(output: Path, count: int, option: str = "--output") -> list[Path]:
    """The files `count` images go to, the grid last; checked before anything slow happens. option: what names them."""
    check_image_path(output, option)
    if count <= 1:
        return [output]
    from ..sampling.noise import check_batch

    if is_stream(output):
        raise ConfigError(f"{option} {output} takes one image, not {count}: name a file, or make one at a time")
    check_batch(count)
    paths = [output.with_name(f"{output.stem}-{tag}{output.suffix}") for tag in (*range(count), "grid")]
    for path in paths:
        check_target(path, option)
    return paths


def check_image_path(path: Path, option: str) -> None:
    """Raises ConfigError where no image can be written. A pipe or device may have any name, and gets a PNG."""
    if path.suffix.lower() not in FORMATS and not is_stream(path):
        raise ConfigError(f"{option} {path!s:.300}: the name must end in one of {', '.join(FORMATS)}")
    check_target(path, option)


def save_image(image: Any, path: Path, facts: dict[str, Any] | None = None) -> None:
    """Writes `path` whole or not at all; PNG files carry `facts` as a text chunk (`CHUNK`)."""
    kind = FORMATS.get(path.suffix.lower(), "PNG")
    options: dict[str, Any] = {"quality": 95} if kind != "PNG" else {}
    if facts and kind == "PNG":
        options["pnginfo"] = text_chunk(facts)
    with replacing(path, durable=False) as partial:
        image.save(partial, format=kind, **options)


def text_chunk(facts: dict[str, Any]) -> Any:
    """PIL's `pnginfo` of `facts`, as JSON in the chunk CHUNK."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    text = json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace")  # paths may be no Unicode
    info.add_itxt(CHUNK, text.decode())
    return info


def grid(images: Sequence[Any], columns: int | None = None) -> Any:
    """One sheet of equal-sized images, row by row; `columns` defaults to the squarest."""
    from PIL import Image

    columns = columns or -(-len(images) // max(1, round(len(images) ** 0.5)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
