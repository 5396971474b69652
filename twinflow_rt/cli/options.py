"""Options that several commands share, beside those of `load`, and loading a model with what was given."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..options import LoadOptions, read_arguments

if TYPE_CHECKING:
    from ..pipeline import Pipeline

MODEL = "model folder (diffusers layout), hf://owner/name, or 'demo'"


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


def chosen_sampler(args: argparse.Namespace) -> Any:
    """Return what --nfe and --mode ask for; None leaves the choice to the model."""
    from ..sampling.schedule import preset

    if args.nfe is None and args.mode in ("any", "multi"):
        return args.mode  # that mode's published settings
    return None if args.nfe is None and args.mode is None else preset(1 if args.nfe is None else args.nfe, args.mode)


def load_model(args: argparse.Namespace, **others: Any) -> Pipeline:
    """Load `args.model` with the options of `load` among `args`, or `others` in their place, and show progress."""
    from ..loading import load

    with _progress(args.model) as progress:
        return load(args.model, **vars(read_arguments(args, LoadOptions, progress=progress, **others)))


@contextmanager
def _progress(model: str) -> Iterator[Callable[[str, int], None]]:
    """Show on stderr, where that is a terminal, what is being loaded; yield the callback of `load`."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("loading {task.description}"), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(model, total=None)
        yield lambda part, size: bar.update(task, advance=size, description=f"{model}: {part}")
