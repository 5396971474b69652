"""The `twinflow-rt` command. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import check_target, replacing
from .errors import ConfigError, TwinFlowError

Parser = argparse.ArgumentParser
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True)
class Command:
    """One subcommand; `add` declares its options and runs only when the command is the one called."""

    help: str
    add: Callable[[Parser], Any]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 for a TwinFlowError, 1 where files cannot be
    written, 130 when interrupted. Errors are one line on stderr."""
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


# -- generate -------------------------------------------------------------------------------------


def add_generate(parser: Parser) -> None:
    parser.add_argument("prompt", nargs="*", help="one or more prompts")
    parser.add_argument(
        "--prompt-embeds", type=Path, metavar="FILE", help="in place of prompts: embeddings that `encode` wrote"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("twinflow.png"),
        metavar="FILE",
        help="image file; several images become FILE-0, FILE-1, ... and FILE-grid (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, help="image k gets seed + k; default: random")
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="WxH",
        help="width x height in pixels, or one number for a square; default: the model's",
    )
    parser.add_argument("--nfe", type=int, help="network evaluations per image; default: 1, or what was saved")
    parser.add_argument(
        "--mode", choices=("few", "any", "multi"), help="sampler rules; default: few up to 8 evaluations"
    )
    parser.add_argument(
        "--num-images", type=int, default=1, metavar="N", help="images per prompt (default %(default)s)"
    )
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        metavar="PATH[:WEIGHT]",
        help="merge this LoRA file; may be given several times (weight: default 1)",
    )
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print files, seeds, seconds and bytes as JSON")


def add_model(parser: Parser) -> None:
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
    parser.add_argument("--fp8-attention", action="store_true", help="with fp8: attention's scores in float8, too")


def precision_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load` that say in how many bits to compute."""
    one = args.exempt[0] if len(args.exempt) == 1 and args.exempt[0].endswith(".json") else None
    exempt = args.exempt if one is None else Path(one)
    return {"precision": args.precision, "exempt": exempt, "fp8_attention": args.fp8_attention}


def add_download(parser: Parser) -> None:
    parser.add_argument("--download", action="store_true", help="fetch a model hf://owner/name[@revision][/subfolder]")


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


def run_generate(args: argparse.Namespace) -> int:
    if bool(args.prompt) == (args.prompt_embeds is not None):
        raise ConfigError("give prompts, or a file of them encoded (--prompt-embeds), and not both")
    saved = None
    if args.prompt_embeds is not None:
        from .embeds_file import read

        saved = read(args.prompt_embeds)
    names = list(saved.names()) if saved is not None else args.prompt
    paths = output_paths(args.output, len(names) * args.num_images)
    from .pipeline import load

    start = time.perf_counter()
    with loading(args.model) as progress:
        options = {"device": args.device, "dtype": args.dtype, "loras": args.lora, **precision_options(args)}
        options["download"] = args.download
        pipe = load(args.model, sampler=chosen_sampler(args), progress=progress, **options)
    load_seconds = time.perf_counter() - start
    width, height = args.size or (None, None)
    given = args.prompt if saved is None else pipe.accept(saved, args.prompt_embeds)
    result = pipe(given, width=width, height=height, seed=args.seed, num_images=args.num_images)
    prompts, nfe = [p for p in names for _ in range(args.num_images)], len(pipe.program.schedule)
    loras = [str(lora) for lora in pipe.program.plan.loras]
    for path, image, prompt, seed in zip(paths, result.images, prompts, result.seeds, strict=False):
        facts = {"prompt": prompt, "seed": seed, "model": args.model, "nfe": nfe}
        save_image(image, path, facts | ({"loras": loras} if loras else {}))
    if len(result.images) > 1:
        save_image(grid(result.images, args.num_images if len(names) > 1 else None), paths[-1])
    report = {
        "files": [str(p) for p in paths],
        "seeds": result.seeds,
        "size": list(result.images[0].size),
        "seconds": {"load": load_seconds, **result.timings},
        "peak_bytes": result.memory,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    print(json.dumps(report, indent=1) if args.json else summary(report))
    return 0


def chosen_sampler(args: argparse.Namespace) -> Any:
    """What --nfe and --mode ask for; None leaves the choice to the model."""
    from .sample import preset

    if args.nfe is None and args.mode in ("any", "multi"):
        return args.mode  # that mode's published settings
    return None if args.nfe is None and args.mode is None else preset(1 if args.nfe is None else args.nfe, args.mode)


def output_paths(output: Path, count: int) -> list[Path]:
    """The files `count` images go to, the grid last; checked before anything slow happens."""
    check_image_path(output, "--output")
    if count <= 1:
        return [output]
    from .noise import check_batch

    check_batch(count)
    paths = [output.with_name(f"{output.stem}-{tag}{output.suffix}") for tag in (*range(count), "grid")]
    for path in paths:
        check_target(path, "--output")
    return paths


def check_image_path(path: Path, option: str) -> None:
    """Raises ConfigError where no image can be written."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{option} {path}: the name must end in one of {', '.join(FORMATS)}")
    check_target(path, option)


def save_image(image: Any, path: Path, facts: dict[str, Any] | None = None) -> None:
    """Writes `path` whole or not at all; PNG files carry `facts` as a text chunk `twinflow_rt`."""
    from PIL.PngImagePlugin import PngInfo

    options: dict[str, Any] = {"quality": 95} if path.suffix.lower() != ".png" else {}
    if facts and path.suffix.lower() == ".png":
        options["pnginfo"] = PngInfo()
        text = json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace")  # paths may be no Unicode
        options["pnginfo"].add_itxt("twinflow_rt", text.decode())
    with replacing(path) as partial:
        image.save(partial, format=FORMATS[path.suffix.lower()], **options)


def grid(images: Sequence[Any], columns: int | None = None) -> Any:
    """One sheet of equal-sized images, row by row; `columns` defaults to the squarest."""
    from PIL import Image

    columns = columns or -(-len(images) // max(1, round(len(images) ** 0.5)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def summary(report: dict[str, Any]) -> str:
    """The report as text: a line per file, then time and memory."""
    seeds = [f" (seed {seed})" for seed in report["seeds"]]
    lines = [f"wrote {file}{seed}" for file, seed in zip(report["files"], [*seeds, ""], strict=False)]
    stages = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in report["seconds"].items())
    peak = max(report["peak_bytes"].values()) / 1e6
    return "\n".join([*lines, f"{report['device']} {report['dtype']}: {stages}; peak {peak:,.0f} MB"])


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


# -- inspect, train, eval -------------------------------------------------------------------------------


def add_inspect(parser: Parser) -> None:
    parser.add_argument("model", help="model folder (diffusers layout), hf://owner/name, or 'demo'")
    add_download(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run_inspect(args: argparse.Namespace) -> int:
    from .describe import describe
    from .pipeline import model_path

    description = describe(model_path(args.model, args.download))
    print(json.dumps(description.to_dict(), indent=1) if args.json else description)
    return 0


def add_encode(parser: Parser) -> None:
    from . import encode

    add_model(parser)
    encode.add_arguments(parser)


def run_encode(args: argparse.Namespace) -> int:
    from . import encode
    from .pipeline import model_path

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
    from .convert import convert

    conversion = convert(args.files, args.base, args.target, dry_run=args.dry_run)
    print(json.dumps(conversion.to_dict(), indent=1) if args.json else conversion)
    conversion.require_complete()  # a dry run reports first
    return 0


def add_kernels(parser: Parser) -> None:
    from . import inventory

    inventory.add_arguments(parser)


def run_kernels(args: argparse.Namespace) -> int:
    from . import inventory

    return inventory.run(args)


def add_train(parser: Parser) -> None:
    from .training import demo

    models = parser.add_subparsers(dest="trained", required=True, metavar="model")
    demo.add_arguments(models.add_parser("demo", help="the shipped miniature, on two CPU cores"))


def run_train(args: argparse.Namespace) -> int:
    from .training import demo

    return demo.run(args)


def add_eval(parser: Parser) -> None:
    from .evaluate import command

    add_model(parser)
    command.add_arguments(parser)


def run_eval(args: argparse.Namespace) -> int:
    from .evaluate import command
    from .pipeline import load

    with loading(args.model) as progress:
        options = {**precision_options(args), "progress": progress, "download": args.download}
        pipe = load(args.model, device=args.device, dtype=args.dtype, **options)
    return command.run(args, pipe)


def add_serve(parser: Parser) -> None:
    from .serve import command

    command.add_arguments(parser)


def run_serve(args: argparse.Namespace) -> int:
    from .serve import command

    def load_model() -> Any:
        from .pipeline import load

        with loading(args.model) as progress:
            options = {
                "precision": args.precision, "nfe": args.nfe, "progress": progress, "download": args.download,
            }  # fmt: skip
            return load(args.model, device=args.device, dtype=args.dtype, **options)

    return command.run(args, load_model)


def add_sensitivity(parser: Parser) -> None:
    from . import sensitivity

    sensitivity.add_arguments(parser)


def run_sensitivity(args: argparse.Namespace) -> int:
    from . import sensitivity
    from .pipeline import load

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
    from .export import command

    command.add_arguments(parser)


def run_export(args: argparse.Namespace) -> int:
    from .export import command

    return command.run(args)


def add_bench(parser: Parser) -> None:
    from .bench import command

    command.add_arguments(parser)


def run_bench(args: argparse.Namespace) -> int:
    from .bench import command

    return command.run(args)


COMMANDS = {
    "generate": Command("Generate images from prompts.", add_generate, run_generate),
    "encode": Command("Encode prompts into a file.", add_encode, run_encode),
    "convert": Command("Write a model folder from weight files under other names.", add_convert, run_convert),
    "inspect": Command("Describe a model folder without loading it.", add_inspect, run_inspect),
    "kernels": Command("List every op's implementations and what speaks against each here.", add_kernels, run_kernels),
    "sensitivity": Command("Measure what int8 or fp8 hurts and gains.", add_sensitivity, run_sensitivity),
    "batch": Command("Make the images of a file of prompts.", add_batch, run_batch),
    "export": Command("Compile a model into a file that runs without Python.", add_export, run_export),
    "bench": Command("Measure a model; compare two measurements.", add_bench, run_bench),
    "eval": Command("Score a model of coloured shapes with a program.", add_eval, run_eval),
    "serve": Command("Serve a model over HTTP (OpenAI's images API).", add_serve, run_serve),
    "train": Command("Train a model.", add_train, run_train),
}

if __name__ == "__main__":
    sys.exit(main())
