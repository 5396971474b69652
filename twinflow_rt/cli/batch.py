"""`twinflow-rt batch`: a file of prompts to a folder of images, in this process or on a Ray cluster.

Each image is written whole or not at all, and holds what it was made of in a text chunk. So a run that
was stopped goes on where it was: with `--resume`, images that are there and were made of the same request
are kept. `manifest.jsonl` lists what the folder holds, one object per image in the prompts' order.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import check_target, replacing, write_text
from ..checkpoint.files import parse_json
from ..errors import CheckpointError, ConfigError
from .image_files import CHUNK, text_chunk
from .prompt_file import FILES, read_rows

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .options import add_batch_invariant, add_on_oom, parse_size
    from .serve import add_ray_arguments

    parser.add_argument("model", help="model folder (diffusers layout), hf://owner/name, or 'demo'")
    parser.add_argument("--download", action="store_true", help="fetch a model hf://owner/name[@revision][/subfolder]")
    parser.add_argument("prompts", type=Path, help=FILES + ", with seed, width, height")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the images go")
    parser.add_argument("--resume", action="store_true", help="go on with a run: keep the images that are there")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="per prompt (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="image k of the run gets seed + k, unless its row has a seed (default 0)"
    )
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="where a row has none; default: the model's")
    parser.add_argument("--nfe", type=int, help="network evaluations per image; default: 1, or what was saved")
    parser.add_argument("--batch-size", type=int, default=4, help="images made together (default %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: fits model and device")
    parser.add_argument("--precision", help="as for `generate`")
    add_batch_invariant(parser)
    add_on_oom(parser)
    add_ray_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Makes what is missing and writes the manifest; returns 0.

    Raises ConfigError for options, rows and a folder that holds other images; what generating raises, and
    then what was finished stays.
    """
    from ..config import check_count

    check_count("num_images", args.num_images)
    check_count("batch_size", args.batch_size)
    check_target(args.output, "--output", make_parents=True)
    requests = plan_requests(read_rows(args.prompts), args)
    args.output.mkdir(parents=True, exist_ok=True)
    missing = select_missing(requests, args.output, args.resume)
    groups = group(missing, args.batch_size)
    try:
        if groups:
            with painted(groups, args) as images, _progress(len(missing)) as advance:
                for name, content in images:
                    with replacing(args.output / name) as partial:
                        partial.write_bytes(content)
                    advance()
    finally:
        write_manifest(requests, args.output)
    kept = len(requests) - len(missing)
    print(f"wrote {len(missing)} images to {args.output}" + (f", kept {kept}" if kept else ""))
    return 0


# -- what to make ---------------------------------------------------------------------------------


def plan_requests(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[Request]:
    """One request per row and repeat, prompt-major; image k of a row with a seed gets that seed + k."""
    from ..config import resolve_prompts
    from ..sampling.noise import resolve_seeds
    from .serve import model_name

    resolve_prompts([row["prompt"] for row in rows])
    repeats, (width, height) = args.num_images, args.size or (None, None)
    defaults = resolve_seeds(args.seed, len(rows) * repeats)
    requests = []
    for i, row in enumerate(rows):
        first = i * repeats
        seeds = resolve_seeds(row["seed"], repeats) if "seed" in row else defaults[first : first + repeats]
        size = row.get("width", width), row.get("height", height)
        for k, seed in enumerate(seeds):
            requests.append(
                Request(f"{first + k:06d}.png", row["prompt"], seed, *size, args.nfe, model_name(args.model))
            )
    return requests


def select_missing(requests: Iterable[Request], folder: Path, resume: bool) -> list[Request]:
    """The requests whose image `folder` lacks. Raises ConfigError where an image is in the way: any without
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
    """What an image says it was made of; None for an image of others. Reads the header only."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return parse_json(image.info.get(CHUNK, "null"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no image that can be read ({error}); remove it and resume") from None


def group(requests: Iterable[Request], size: int) -> list[list[Request]]:
    """Batches of at most `size` requests of one image size."""
    alike: dict[tuple[int | None, int | None], list[Request]] = {}
    for request in requests:
        alike.setdefault((request.width, request.height), []).append(request)
    return [rows[i : i + size] for rows in alike.values() for i in range(0, len(rows), size)]


# -- making it ------------------------------------------------------------------------------------


@contextmanager
def painted(groups: list[list[Request]], args: argparse.Namespace) -> Iterator[Iterator[Written]]:
    """The images of all groups as they are finished, made here or by a Ray cluster."""
    from .serve import LOADING

    options = {name: getattr(args, name) for name in LOADING}
    if args.ray is None:
        from ..loading import load
        from .options import loading

        with loading(args.model) as progress:
            pipe = load(args.model, progress=progress, **options)
        yield (image for requests in groups for image in paint(pipe, requests, args.on_oom))
        return
    try:
        from ..serve import ray_data
    except ModuleNotFoundError as error:
        raise ConfigError(f"--ray needs {error.name}: pip install 'twinflow-rt[ray]'") from None
    with ray_data.painted(groups, options, args) as images:
        yield images


def paint(pipe: Any, requests: Sequence[Request], on_oom: str) -> list[Written]:
    """Makes one batch; the images as PNG files that say what they were made of. on_oom: as for `Pipeline`."""
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
    """Lists the images that `folder` holds."""
    lines = [json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in requests if (folder / r.file).exists()]
    write_text(folder / MANIFEST, "".join(lines))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where that is a terminal; yields what moves it by one image."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("images", total=total)
        yield lambda: bar.advance(task)
