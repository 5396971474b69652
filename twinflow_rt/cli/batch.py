"""`twinflow-rt batch`: a file of prompts to a folder of images, in this process or on a Ray cluster."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import require_extra
from ..options import LoadOptions, read_arguments
from ..options import add_arguments as add_options
from ..serve.settings import LOAD_SKIPS, RayOptions, model_name
from .options import MODEL, add_on_oom, load_model, parse_size
from .progress import counting
from .prompt_file import FILES, read_rows

if TYPE_CHECKING:
    from ..serve.batch import Request, Written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("prompts", type=Path, help=FILES + ", with seed, width, height")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the images go")
    parser.add_argument("--resume", action="store_true", help="go on with a run: keep the images that are there")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="per prompt (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="image k of the run gets seed + k, unless its row has a seed (default 0)"
    )
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="where a row has none; default: the model's")
    parser.add_argument("--batch-size", type=int, default=4, help="images made together (default %(default)s)")
    add_options(parser, LoadOptions, skip=LOAD_SKIPS)
    add_on_oom(parser)
    add_options(parser, RayOptions)


def run(args: argparse.Namespace) -> int:
    """Make what is missing and write the manifest; return 0.

    Raises ConfigError for options, rows and a folder that holds other images; what generating raises, and
    then what was finished stays.
    """
    from ..checkpoint.atomic import check_target, replacing
    from ..config import check_count
    from ..serve import batch

    if args.ray is not None:
        require_extra("--ray", "ray", "ray")
    check_count("num_images", args.num_images)
    check_count("batch_size", args.batch_size)
    check_target(args.output, "--output", make_parents=True)
    requests = batch.plan_requests(
        read_rows(args.prompts), model_name(args.model), seed=args.seed, num_images=args.num_images, size=args.size,
        nfe=args.nfe,
    )  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    missing = batch.select_missing(requests, args.output, args.resume)
    groups = batch.group(missing, args.batch_size)
    try:
        if groups:
            what = f"making {len(missing)} image{'s' * (len(missing) > 1)}"
            with painted(groups, args) as images, counting(what, len(missing)) as advance:
                for name, content in images:
                    with replacing(args.output / name, durable=False) as partial:
                        partial.write_bytes(content)
                    advance(1)
    finally:
        batch.write_manifest(requests, args.output)
    kept = len(requests) - len(missing)
    print(f"wrote {len(missing)} images to {args.output}" + (f", kept {kept}" if kept else ""))
    return 0


@contextmanager
def painted(groups: list[list[Request]], args: argparse.Namespace) -> Iterator[Iterator[Written]]:
    """Yield the images of all groups as they are finished, made here or by a Ray cluster."""
    from ..serve import batch

    width, height = args.size or (None, None)
    largest = (height, width, args.batch_size)
    if args.ray is None:
        pipe = load_model(args, largest=largest)
        yield (image for requests in groups for image in batch.paint(pipe, requests, args.on_oom))
        return
    from ..serve import ray_data

    options = read_arguments(args, LoadOptions, largest=largest)
    with ray_data.painted(groups, args.model, options, args.on_oom, read_arguments(args, RayOptions)) as images:
        yield images
