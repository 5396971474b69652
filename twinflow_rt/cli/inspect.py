"""`twinflow-rt inspect`: what a model folder holds, what an image costs, and what fits a card; no weight is loaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..options import LoadOptions, read_arguments
from ..options import add_arguments as add_options
from .options import MODEL, parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help=f"{MODEL}; with --cards also z-image, qwen-image, ...: their "
        "published configurations, all of them if left out",
    )  # fmt: skip
    add_options(parser, LoadOptions, only=("base", "files", "download"))
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="of the image whose work is counted")
    parser.add_argument("--tokens", type=int, metavar="N", help="length of its prompt (default: 32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    parser.add_argument("--ceilings", type=Path, metavar="RECORD", help="a bench's: state times for its machine, too")
    parser.add_argument(
        "--cards", action="store_true",
        help="print the plan that fits GPUs of 6, 8, 12, 16 and 24 GB: precision, what streams, tiles",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from ..bench import record
    from ..config import DTYPES
    from ..loading import open_model
    from ..planning.description import describe

    width, height = args.size or (None, None)
    if args.cards:
        return _print_cards(args, (height, width))
    if args.model is None:
        raise ConfigError("inspect needs a model; with --cards alone it tells of all published ones")
    options: dict[str, Any] = {} if args.tokens is None else {"tokens": args.tokens}
    if args.dtype is not None:
        options["dtype"] = DTYPES[args.dtype]
    if args.ceilings is not None:
        options["ceilings"] = record.load(args.ceilings)["ceilings"]
    folder, files = open_model(args.model, read_arguments(args, LoadOptions))
    description = describe(folder, (height, width), files=files, **options)
    print(json.dumps(description.to_dict(), indent=1) if args.json else description)
    return 0


def _print_cards(args: argparse.Namespace, size: tuple[int | None, int | None]) -> int:
    """Print what fits which card: of the model asked for, else of all that have published configurations."""
    from ..bench.blueprints import BLUEPRINTS
    from ..bench.random_weights import temporary
    from ..loading import open_model
    from ..planning.cards import count, fits, table

    found = []
    for name in BLUEPRINTS if args.model is None else [args.model]:
        if name in BLUEPRINTS:
            with temporary(name) as folder:
                found += fits(name, *count(folder, size))
        else:
            folder, files = open_model(name, read_arguments(args, LoadOptions))
            found += fits(name, *count(folder, size, files))
    print(json.dumps(found, indent=1) if args.json else table(found))
    return 0
