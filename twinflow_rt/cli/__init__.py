"""The `twinflow-rt` command. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TwinFlowError
from . import generate
from .options import add_download, add_model, loading, parse_size, precision_options

Parser = argparse.ArgumentParser


@dataclass(frozen=True)
class Command:
    """One subcommand; `add` declares its options and runs only when the command is the one called."""

    help: str
    add: Callable[[Parser], Any]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 for a TwinFlowError (a full disk among them), 1 for
    any other OSError (a port in use), 130 when interrupted. Errors are one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(argv).parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # names of files may be no Unicode, and terminals no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return COMMANDS[args.command].run(args)
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


def build_parser(argv: Sequence[str] = ()) -> Parser:
    """The parser; only the options of the command named in `argv` are declared, so `--help` stays fast."""
    parser = Parser(prog="twinflow-rt", description="Few-step text-to-image inference with TwinFlow models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    called = next((a for a in argv if not a.startswith("-")), None)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        if name == called:
            command.add(sub)
    return parser


# -- inspect, train, eval -------------------------------------------------------------------------------


def add_inspect(parser: Parser) -> None:
    parser.add_argument("model", help="model folder (diffusers layout), hf://owner/name, or 'demo'")
    add_download(parser)
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="of the image whose work is counted")
    parser.add_argument("--tokens", type=int, metavar="N", help="length of its prompt (default: 32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    parser.add_argument("--ceilings", type=Path, metavar="RECORD", help="a bench's: state times for its machine, too")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run_inspect(args: argparse.Namespace) -> int:
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


def add_encode(parser: Parser) -> None:
    from . import encode

    add_model(parser)
    encode.add_arguments(parser)


def run_encode(args: argparse.Namespace) -> int:
    from ..loading import model_path
    from . import encode

    return encode.run(args, model_path(args.model, args.download))


def add_convert(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="safetensors files, or folders of them")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the model folder to write")
    parser.add_argument(
        "--base", type=Path, required=True, metavar="FOLDER",
        help="the released model in diffusers' layout: its configs, tokenizer, and the networks FILEs lack",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="report, key by key, and write nothing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with every key")


def run_convert(args: argparse.Namespace) -> int:
    from ..convert import convert

    conversion = convert(args.files, args.base, args.target, dry_run=args.dry_run)
    print(json.dumps(conversion.to_dict(), indent=1) if args.json else conversion)
    conversion.require_complete()  # a dry run reports first
    return 0


def add_kernels(parser: Parser) -> None:
    from . import kernels as inventory

    inventory.add_arguments(parser)


def run_kernels(args: argparse.Namespace) -> int:
    from . import kernels as inventory

    return inventory.run(args)


def add_train(parser: Parser) -> None:
    from ..training import demo

    models = parser.add_subparsers(dest="trained", required=True, metavar="model")
    demo.add_arguments(models.add_parser("demo", help="the shipped miniature, on two CPU cores"))


def run_train(args: argparse.Namespace) -> int:
    from ..training import demo

    return demo.run(args)


def add_eval(parser: Parser) -> None:
    from . import eval as command

    add_model(parser)
    command.add_arguments(parser)


def run_eval(args: argparse.Namespace) -> int:
    from ..loading import load
    from . import eval as command

    with loading(args.model) as progress:
        options = {**precision_options(args), "progress": progress, "download": args.download}
        pipe = load(args.model, device=args.device, dtype=args.dtype, **options)
    return command.run(args, pipe)


def add_serve(parser: Parser) -> None:
    from . import serve as command

    command.add_arguments(parser)


def run_serve(args: argparse.Namespace) -> int:
    from . import serve as command

    def load_model() -> Any:
        from ..loading import load

        with loading(args.model) as progress:
            options = {name: getattr(args, name) for name in command.LOADING}
            return load(args.model, progress=progress, **options)

    return command.run(args, load_model)


def add_sensitivity(parser: Parser) -> None:
    from ..planning import sensitivity

    sensitivity.add_arguments(parser)


def run_sensitivity(args: argparse.Namespace) -> int:
    from ..loading import load
    from ..planning import sensitivity

    with loading(args.model) as progress:
        pipe = load(args.model, device=args.device, dtype=args.dtype, progress=progress)
    return sensitivity.run(args, pipe)


def add_batch(parser: Parser) -> None:
    from . import batch

    batch.add_arguments(parser)


def run_batch(args: argparse.Namespace) -> int:
    from . import batch

    return batch.run(args)


def add_export(parser: Parser) -> None:
    from . import export as command

    command.add_arguments(parser)


def run_export(args: argparse.Namespace) -> int:
    from . import export as command

    return command.run(args)


def add_bench(parser: Parser) -> None:
    from . import bench as command

    command.add_arguments(parser)


def run_bench(args: argparse.Namespace) -> int:
    from . import bench as command

    return command.run(args)


COMMANDS = {
    "generate": Command("Generate images from prompts.", generate.add_arguments, generate.run),
    "encode": Command("Encode prompts into a file.", add_encode, run_encode),
    "convert": Command("Write a model folder from weight files under other names.", add_convert, run_convert),
    "inspect": Command("Describe a model folder without loading it.", add_inspect, run_inspect),
    "kernels": Command("List every op's implementations and what speaks against each here.", add_kernels, run_kernels),
    "sensitivity": Command("Measure what int8, fp8 or bf16 hurts and gains.", add_sensitivity, run_sensitivity),
    "batch": Command("Make the images of a file of prompts.", add_batch, run_batch),
    "export": Command("Compile a model into a file that runs without Python.", add_export, run_export),
    "bench": Command("Measure a model; compare two measurements.", add_bench, run_bench),
    "eval": Command("Score a model of coloured shapes with a program.", add_eval, run_eval),
    "serve": Command("Serve a model over HTTP (OpenAI's images API).", add_serve, run_serve),
    "train": Command("Train a model.", add_train, run_train),
}
