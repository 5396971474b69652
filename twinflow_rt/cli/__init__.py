"""The `twinflow-rt` command: a table of commands, each a module of this package with

    add_arguments(parser)    declares its options
    run(args) -> int         does it and returns the exit status

Only the module of the command that is called is imported, and heavy imports happen inside `run`: help is quick.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, TextIO

from ..errors import PromptTruncatedWarning, TwinFlowError
from ..host_memory import address_space_margin, lacking_address_space, torch_bytes

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
    if not {"-h", "--help"} & {*argv} and (lack := lacking_address_space(torch_bytes() + address_space_margin(1))):
        print(f"twinflow-rt: too little memory to start ({lack})", file=sys.stderr)
        return 2
    args = build_parser(argv).parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # names of files may be no Unicode, and terminals no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            status: int = _module(args.command).run(args)
        return status
    except TwinFlowError as error:
        print(f"twinflow-rt: {' '.join(str(error).split()):.2000}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"twinflow-rt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser; only the options of the command named in `argv` are declared, so `--help` stays fast."""
    description = "Few-step text-to-image inference with TwinFlow models."
    parser = argparse.ArgumentParser(prog="twinflow-rt", description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    called = next((a for a in argv if not a.startswith("-")), None)
    for name, help in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help)
        if name == called:
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


def _module(command: str) -> Any:
    return import_module(f".{command}", __package__)
