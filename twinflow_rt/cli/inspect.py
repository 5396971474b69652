"""`twinflow-rt inspect`: what a model folder holds and what an image costs; no weight is loaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..options import LoadOptions
from ..options import add_arguments as add_options
from .options import MODEL, parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    add_options(parser, LoadOptions, only=("download",))
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="of the image whose work is counted")
    parser.add_argument("--tokens", type=int, metavar="N", help="length of its prompt (default: 32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    parser.add_argument("--ceilings", type=Path, metavar="RECORD", help="a bench's: state times for its machine, too")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from ..bench import record
    from ..config import DTYPES
    from ..loading import model_path
    from ..planning.description import describe

    width, height = args.size or (None, None)
    options: dict[str, Any] = {} if args.tokens is None else {"tokens": args.tokens}
    if args.dtype is not None:
        options["dtype"] = DTYPES[args.dtype]
    if args.ceilings is not None:
        options["ceilings"] = record.load(args.ceilings)["ceilings"]
    description = describe(model_path(args.model, args.download), (height, width), **options)
    print(json.dumps(description.to_dict(), indent=1) if args.json else description)
    return 0
