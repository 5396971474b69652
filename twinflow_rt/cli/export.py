"""`twinflow-rt export`: a model as one file that runs without Python."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..options import LoadOptions
from ..options import add_arguments as add_options
from .options import MODEL, add_mode, chosen_sampler, parse_size
from .progress import doing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the .pt2 file to write")
    parser.add_argument(
        "--size", type=parse_size, action="append", default=[], metavar="WxH",
        help="image size to compile for; may be given several times (default: the model's)",
    )  # fmt: skip
    parser.add_argument("--text-encoder", action="store_true", help="export the text encoder, too: token ids in")
    add_mode(parser)
    add_options(parser, LoadOptions, only=("base", "files", "nfe", "loras", "device", "dtype"))
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON, but for lists of parts")


def run(args: argparse.Namespace) -> int:
    from ..export.program import export_model

    with doing(f"exporting {args.model} (this takes minutes)") as progress:
        manifest = export_model(
            args.model, args.output, sizes=[(height, width) for width, height in args.size], base=args.base,
            files=args.files, device=args.device, dtype=args.dtype, loras=args.loras,
            text_encoder=args.text_encoder, progress=lambda doing: progress(doing), **chosen_sampler(args),
        )  # fmt: skip
    if args.json:
        shown = {k: v for k, v in manifest.items() if k not in ("programs", "weights", "files")}
        print(json.dumps(shown, indent=1))
    else:
        sizes = ", ".join(f"{width}x{height}" for height, width in manifest["sizes"])
        total = args.output.stat().st_size / 1e6
        what = f"{manifest['family']}, {manifest['dtype']}, {manifest['nfe']} evaluation(s)"
        print(f"wrote {args.output}: {what}, {sizes}; {total:,.1f} MB")
    return 0
