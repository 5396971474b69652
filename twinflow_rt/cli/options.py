"""Options that several commands share, and what their values mean to `load`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that every command loading a model shares."""
    parser.add_argument("--model", default="demo", help="model folder, hf://owner/name, or 'demo' (default)")
    add_download(parser)
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: fits model and device")
    parser.add_argument(
        "--precision",
        help="fp32, fp16 or bf16, as --dtype; int8 (CPU) or fp8 (GPU): 8-bit linear layers; auto: int8 or fp8 if it "
        "measured faster and accurate here (see sensitivity)",
    )
    parser.add_argument(
        "--exempt", nargs="+", default=[], metavar="NAME",
        help="layers kept out of int8 or fp8: parts of their names, or one .json file of `sensitivity --save`",
    )  # fmt: skip
    parser.add_argument("--text-precision", choices=("int8", "fp8"), help="8-bit linear layers of the text encoders")
    parser.add_argument("--fp8-attention", action="store_true", help="with fp8: attention's scores in float8, too")


def add_download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--download", action="store_true", help="fetch a model hf://owner/name[@revision][/subfolder]")


def add_batch_invariant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-invariant", action="store_true",
        help="an image's bits do not depend on the images beside it, at the price of what batching gains",
    )  # fmt: skip


def add_on_oom(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-oom", choices=("raise", "split"), default="raise",
        help="split: where memory runs out, begin again with half as many images at once (default %(default)s)",
    )  # fmt: skip


def precision_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load` that say in how many bits to compute."""
    one = args.exempt[0] if len(args.exempt) == 1 and args.exempt[0].endswith(".json") else None
    exempt = args.exempt if one is None else Path(one)
    return {
        "precision": args.precision, "skip_layers": exempt, "fp8_attention": args.fp8_attention,
        "text_precision": args.text_precision,
    }  # fmt: skip


def parse_size(text: str) -> tuple[int, int]:
    """ "WxH" or "N" -> (width, height)."""
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WxH or one number") from None


def parse_lora(text: str) -> tuple[str, float]:
    """ "PATH" or "PATH:WEIGHT" -> (path, weight)."""
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0  # the colon is part of the path


def chosen_sampler(args: argparse.Namespace) -> Any:
    """What --nfe and --mode ask for; None leaves the choice to the model."""
    from ..sampling.sampler import preset

    if args.nfe is None and args.mode in ("any", "multi"):
        return args.mode  # that mode's published settings
    return None if args.nfe is None and args.mode is None else preset(1 if args.nfe is None else args.nfe, args.mode)


@contextmanager
def loading(model: str) -> Iterator[Callable[[str, int], None]]:
    """Shows on stderr, where that is a terminal, what is being loaded; yields the callback of `load`."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("loading {task.description}"), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(model, total=None)
        yield lambda part, size: bar.update(task, advance=size, description=f"{model}: {part}")
