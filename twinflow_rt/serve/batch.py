"""A file of prompts to a folder of images: what to make, what is there already, one batch at a time.

Each image is written whole or not at all, and holds what it was made of in a text chunk. So a run that
was stopped goes on where it was: images that are there and were made of the same request are kept.
`manifest.jsonl` lists what the folder holds, one object per image in the prompts' order.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import write_text
from ..checkpoint.files import parse_json
from ..checkpoint.image_files import CHUNK, text_chunk
from ..config import resolve_prompts
from ..errors import CheckpointError, ConfigError
from ..sampling.noise import resolve_seeds

MANIFEST = "manifest.jsonl"
Written = tuple[str, bytes]  # a file's name and content


@dataclass(frozen=True)
class Request:
    """One image to make. width, height, nfe: None is the model's own. model: its name, for the record."""

    file: str
    prompt: str
    seed: int
    width: int | None
    height: int | None
    nfe: int | None
    model: str


def plan_requests(
    rows: Sequence[dict[str, Any]], model: str, *, seed: int = 0, num_images: int = 1,
    size: tuple[int, int] | None = None, nfe: int | None = None,
) -> list[Request]:  # fmt: skip
    """Return one request per row and repeat, prompt-major; image k of a row with a seed gets that seed + k, image k
    of the run else `seed` + k. size: (width, height) where a row has none. model: its name. Raises ConfigError."""
    resolve_prompts([row["prompt"] for row in rows])
    width, height = size or (None, None)
    defaults = resolve_seeds(seed, len(rows) * num_images)
    requests = []
    for i, row in enumerate(rows):
        first = i * num_images
        seeds = resolve_seeds(row["seed"], num_images) if "seed" in row else defaults[first : first + num_images]
        wanted = row.get("width", width), row.get("height", height)
        for k, own in enumerate(seeds):
            requests.append(Request(f"{first + k:06d}.png", row["prompt"], own, *wanted, nfe, model))
    return requests


def select_missing(requests: Iterable[Request], folder: Path, resume: bool) -> list[Request]:
    """Return the requests whose image `folder` lacks. Raises ConfigError where an image is in the way: any without
    `resume`, one made of another request with it."""
    missing = []
    for request in requests:
        path = folder / request.file
        if not path.exists():
            missing.append(request)
        elif not resume:
            raise ConfigError(f"{path} exists; add --resume to go on with a run, or choose an empty --output folder")
        elif recorded(path) != asdict(request):
            raise ConfigError(f"{path} was made of another request; choose an empty --output folder")
    return missing


def recorded(path: Path) -> Any:
    """Return what an image says it was made of; None for an image of others. Reads the header only."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return parse_json(image.info.get(CHUNK, "null"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no image that can be read ({error}); remove it and resume") from None


def group(requests: Iterable[Request], size: int) -> list[list[Request]]:
    """Return batches of at most `size` requests of one image size."""
    alike: dict[tuple[int | None, int | None], list[Request]] = {}
    for request in requests:
        alike.setdefault((request.width, request.height), []).append(request)
    return [rows[i : i + size] for rows in alike.values() for i in range(0, len(rows), size)]


def paint(pipe: Any, requests: Sequence[Request], on_oom: str) -> list[Written]:
    """Make one batch; return the images as PNG files that say what they were made of. on_oom: as for `Pipeline`."""
    first = requests[0]
    result = pipe(
        [r.prompt for r in requests], width=first.width, height=first.height, seed=[r.seed for r in requests],
        on_oom=on_oom,
    )  # fmt: skip
    files = []
    for request, image in zip(requests, result.images, strict=True):
        file = io.BytesIO()
        image.save(file, format="PNG", pnginfo=text_chunk(asdict(request)))
        files.append((request.file, file.getvalue()))
    return files


def write_manifest(requests: Iterable[Request], folder: Path) -> None:
    """List the images that `folder` holds."""
    lines = [json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in requests if (folder / r.file).exists()]
    write_text(folder / MANIFEST, "".join(lines))
