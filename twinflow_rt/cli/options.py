"""Options that several commands share, beside those of `load`, and loading a model with what was given."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TwinFlowError
from ..options import LoadOptions, read_arguments
from .progress import counting, say

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Files
    from ..pipeline import Pipeline

MODEL = "model folder (diffusers layout), hf://owner/name, or 'demo'; with --base, weights of one network"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare --model, for the commands whose positional arguments are prompts."""
    parser.add_argument("--model", default="demo", help=f"{MODEL} (default)")


def add_on_oom(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-oom", choices=("raise", "split"), default="raise",
        help="split: where memory runs out, begin again with half as many images at once (default %(default)s)",
    )  # fmt: skip


def add_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode", choices=("few", "any", "multi"), help="sampler rules; default: few up to 8 evaluations"
    )


def parse_size(text: str) -> tuple[int, int]:
    """ "WxH" or "N" -> (width, height)."""
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WxH or one number") from None


def chosen_sampler(args: argparse.Namespace) -> dict[str, Any]:
    """Return what --nfe and --mode ask for, as `load` takes it: without a mode the choice is the model's."""
    from ..sampling.schedule import preset

    if args.mode is None:
        return {"nfe": args.nfe}
    published = args.nfe is None and args.mode in ("any", "multi")  # that mode's settings
    return {"nfe": None, "sampler": args.mode if published else preset(args.nfe or 1, args.mode)}


def load_model(args: argparse.Namespace, **others: Any) -> Pipeline:
    """Load `args.model` with the options of `load` among `args`, or `others` in their place; say on stderr how far
    that is, then what the network computes in, and why if that was left to "auto"."""
    from ..loading import Asked, load_opened, open_model
    from ..planning.precision import AUTO

    options = read_arguments(args, LoadOptions, **others)
    if options.download:
        say(f"fetching what is missing of {args.model}")
    folder, files = open_model(args.model, options)
    with counting(f"loading {args.model}", bytes_of(folder, files), unit="bytes") as advance:
        tell = lambda part, size: advance(size, part)
        pipe = load_opened(folder, files, Asked.of(replace(options, progress=tell)))
    plan = pipe.program.plan
    say(f"{args.model}: {plan.family}, {plan.arithmetic}, on {pipe.device}, {len(plan.schedule)} evaluation(s)")
    for note in plan.notes:
        if note.startswith(AUTO):
            say(f"{args.model}: {note}")
    return pipe


def bytes_of(folder: Path, files: Files) -> int | None:
    """Return how many bytes the weights of a model that is open have; None where `load` will refuse it."""
    from ..checkpoint.checkpoint import Checkpoint
    from ..checkpoint.model_folder import weight_files

    try:
        parts = {path.parent for path in weight_files(folder)} | {folder / part for part in files}
        return sum(Checkpoint.of_part(part, files, quantized=True).total_bytes() for part in parts) or None
    except (TwinFlowError, OSError):
        return None
