"""What a command is doing, on stderr: a bar or a spinner on a terminal, elsewhere one plain line per stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def say(text: str) -> None:
    """Write one line."""
    print(text, file=sys.stderr, flush=True)


def terminal() -> Any:
    """Return rich's console of stderr, where that is a terminal that can draw bars, else None."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return None if console.is_dumb_terminal else console


@contextmanager
def doing(what: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done, and for how long; yield what is told of each stage that begins."""
    began = time.monotonic()
    if (console := terminal()) is None:
        say(what)
        yield lambda stage: say(f"{what}: {stage}, {time.monotonic() - began:.0f} s after the start")
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda stage: bar.update(task, description=f"{what}: {stage}")


@contextmanager
def counting(what: str, total: int | None, unit: str = "") -> Iterator[Callable[..., None]]:
    """Show how much of `total` is done; yield advance(amount, stage=None): stage says what is done now.

    Off a terminal there is a line for each stage, and for each tenth of what has no unit. unit: "bytes" or "".
    """
    if (console := terminal()) is None:
        say(what)
        done = 0

        def advance(amount: int, stage: str | None = None) -> None:
            nonlocal done
            before, done = done, done + amount
            if not unit and (stage is not None or (total and 10 * done // total > 10 * before // total)):
                say(f"{what}: {stage or f'{done} of {total}'}")

        yield advance
        return
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    counter = DownloadColumn() if unit else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), counter, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount, stage=None: bar.update(
            task, advance=amount, description=what if stage is None else f"{what}: {stage}"
        )
