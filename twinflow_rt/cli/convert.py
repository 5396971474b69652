"""`twinflow-rt convert`: weight files under other names to a model folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .progress import doing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="safetensors or GGUF, or folders of them")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the model folder to write")
    parser.add_argument(
        "--base", type=Path, required=True, metavar="FOLDER",
        help="the released model in diffusers' layout, or 'demo': its configs, tokenizer, and the networks FILEs lack",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="report, key by key, and write nothing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with every key")


def run(args: argparse.Namespace) -> int:
    from ..convert import convert

    with doing(f"{'comparing' if args.dry_run else 'converting'} {len(args.files)} file(s) or folder(s)"):
        conversion = convert(args.files, args.base, args.target, dry_run=args.dry_run)
    print(json.dumps(conversion.to_dict(), indent=1) if args.json else conversion)
    conversion.require_complete()  # a dry run reports first
    return 0
