"""The `twinflow-rt` command: a table of commands, each a module of this package with

    add_arguments(parser)    declares its options
    run(args) -> int         does it and returns the exit status

Only the module of the command that is called is imported, and heavy imports happen inside `run`: help is quick.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from typing import Any, NoReturn, TextIO

from .. import __version__
from ..checkpoint.atomic import is_stdout
from ..errors import PromptTruncatedWarning, TwinFlowError, require_extra
from ..host_memory import address_space_margin, lacking_address_space, torch_bytes
from .parser import Parser

COMMANDS = {
    "generate": "Generate images from prompts.",
    "encode": "Encode prompts into a file.",
    "convert": "Write a model folder from weight files under other names.",
    "inspect": "Describe a model folder without loading it.",
    "kernels": "List every op's implementations and what speaks against each here.",
    "sensitivity": "Measure what int8, fp8 or bf16 hurts and gains.",
    "batch": "Make the images of a file of prompts.",
    "export": "Compile a model into a file that runs without Python.",
    "bench": "Measure a model; compare two measurements.",
    "eval": "Score a model of coloured shapes with a program.",
    "serve": "Serve a model over HTTP (OpenAI's images API).",
    "train": "Train a model.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 2 for a TwinFlowError (a full disk among them), 1 for
    any other OSError (a port in use), 130 when interrupted. Errors are one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    asks = not argv or bool({"-h", "--help"} & {*argv})
    if not asks and (lack := lacking_address_space(torch_bytes() + address_space_margin(1))):
        print(f"twinflow-rt: too little memory to start ({lack})", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):  # names of files may be no Unicode, and terminals no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with interruptible() as interrupted, warnings.catch_warnings():
            warnings.showwarning = _show
            return _run(argv)
    except TwinFlowError as error:
        if interrupted:
            return _interrupted()
        print(f"twinflow-rt: {' '.join(str(error).split()):.2000}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if interrupted:
            return _interrupted()
        print(f"twinflow-rt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _interrupted()
    except Exception:
        if interrupted:  # a library made another exception of it
            return _interrupted()
        raise


def _run(argv: list[str]) -> int:
    parser = build_parser(argv)
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    aside = any(map(is_stdout, vars(args).values()))  # what is said goes elsewhere than what is written
    with redirect_stdout(sys.stderr) if aside else nullcontext():
        status: int = _module(args.command).run(args)
    return status


def _interrupted() -> int:
    print("twinflow-rt: interrupted", file=sys.stderr)
    return 130


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Let Ctrl-C raise KeyboardInterrupt once, and a second one end the process at once, without a traceback; yield a
    list that is no longer empty then, as libraries may make other exceptions of it."""
    seen: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield seen
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def build_parser(argv: Sequence[str] = (), complete: bool = False) -> Parser:
    """Return the parser; only the options of the command named in `argv` are declared, so `--help` stays fast.

    complete: declare those of all commands.
    """
    parser = Parser(prog="twinflow-rt", description="Few-step text-to-image inference with TwinFlow models.")
    parser.add_argument(
        "--version", action=Version, nargs=0, default=argparse.SUPPRESS, help="print versions and the device, and exit"
    )
    parser.add_argument(
        "--print-completion", action=Completion, choices=("bash", "zsh", "tcsh"), default=argparse.SUPPRESS,
        help="print a completion script for this shell, and exit (needs shtab)",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    called = next((a for a in argv if not a.startswith("-")), None)
    for name, help in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help)
        if complete or name == called:
            _module(name).add_arguments(sub)
    return parser


def _show(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """Print a warning: those about prompts as errors look, others as Python does."""
    ours = f"twinflow-rt: warning: {' '.join(str(message).split())}\n"
    told = issubclass(category, PromptTruncatedWarning)
    sys.stderr.write(ours if told else warnings.formatwarning(message, category, filename, lineno))


class Version(argparse.Action):
    """Print the versions that a report of a fault should name."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import torch

        from ..config import resolve_device
        from ..runtime.machine import device_name

        device = device_name(resolve_device(None))
        print(f"twinflow-rt {__version__}, Python {platform.python_version()}, torch {torch.__version__}, {device}")
        parser.exit()


class Completion(argparse.Action):
    """Print what makes a shell complete commands, options and their choices."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, *_: Any) -> NoReturn:
        require_extra("completion", "completion", "shtab")
        import shtab

        print(shtab.complete(build_parser(complete=True), shell))
        parser.exit()


def _module(command: str) -> Any:
    return import_module(f".{command}", __package__)
