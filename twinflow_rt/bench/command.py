"""`twinflow-rt bench`: MODEL measures, `compare A B` judges two records, `show A` prints one again."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError

EPILOG = """\
examples:
  twinflow-rt bench demo --peers eager,diffusers --json now.json --html now.html
  twinflow-rt bench --random-weights z-image --size 1024 --peers eager,diffusers
  twinflow-rt bench compare before.json now.json --gate
  twinflow-rt bench show now.json --html now.html
"""


def counts(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4); "" -> ()."""
    try:
        values = tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,2,4") from None
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers must be 1 or more")
    return values


def names(text: str) -> tuple[str, ...]:
    """ "eager,diffusers" -> ("eager", "diffusers")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def add_arguments(parser: argparse.ArgumentParser, size: Callable[[str], tuple[int, int]]) -> None:
    """Options of the command; size: the parser of WxH."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument(
        "target", nargs="*", metavar="MODEL | compare A B | show A",
        help="model folder or 'demo' (default); or two records to compare; or a record to show",
    )  # fmt: skip
    what = parser.add_argument_group("what is measured")
    what.add_argument("--random-weights", metavar="NAME", help="a published model without its files: z-image, qwen-image, sd3.5-m, sana, sana-sprint")
    what.add_argument("--scale", type=float, help="with --random-weights: factor on all widths, for small machines")
    what.add_argument("--layers", type=int, help="with --random-weights: at most so many layers per network")
    what.add_argument("--size", type=size, metavar="WxH", help="pixels; default: the model's")
    what.add_argument("--batch", type=int, help="images per call (default 1)")
    what.add_argument("--nfe", type=int, help="network evaluations per image (default 1)")
    what.add_argument("--dtype", help="float32, bfloat16 or float16; default: fits model and device")
    what.add_argument("--precision", help="fp32, fp16, bf16 or int8, as `twinflow_rt.load` takes it")
    what.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    what.add_argument("--backend", metavar="NAME", help="implementation to prefer: auto, eager, native, triton, cuda, cudnn, ...")
    what.add_argument("--peers", type=names, metavar="LIST", help="compare with eager, compile, diffusers (comma-separated)")
    what.add_argument("--prompt", help="default: built-in ones")
    what.add_argument("--seed", type=int, help="of the first image (default 0)")
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--repeats", type=int, help="rounds (default 20)")
    how.add_argument("--warmup", type=int, help="unmeasured rounds before (default 3)")
    how.add_argument("--batches", type=counts, metavar="LIST", help="batch sizes of the throughput sweep (default 1,2,4; '' for none)")
    how.add_argument("--callers", type=counts, metavar="LIST", help="concurrent callers (default 1,2,4; '' for none)")
    how.add_argument("--evaluations", type=counts, metavar="LIST", help="evaluations per image to time (default 1,2,4; '' for none)")
    how.add_argument("--cold-runs", type=int, metavar="N", help="fresh processes for the cold start (default 3; 0 for none)")
    how.add_argument("--instructions", action="store_true", default=None, dest="count_instructions", help="count instructions per image (perf, or slowly callgrind)")
    how.add_argument("--tolerance", type=float, help="accept outputs of at most this rms error instead of the error rule")
    how.add_argument("--no-check", action="store_false", default=None, dest="check", help="do not compare outputs with the float32 reference; forbids --peers")
    out = parser.add_argument_group("reports")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the record")
    out.add_argument("--html", type=Path, metavar="FILE", help="write the page with plots")
    judge = parser.add_argument_group("compare")
    judge.add_argument("--gate", action="store_true", help="exit with 1 if a speed-up or an instruction count got worse")
    judge.add_argument("--any-machine", action="store_true", help="compare records of different machines all the same")
    judge.add_argument("--threshold", type=float, default=0.03, help="change that runs differ by anyway (default %(default)s)")


SETTINGS = (
    "random_weights", "scale", "layers", "size", "batch", "nfe", "dtype", "precision", "device", "backend", "peers", "prompt",
    "seed", "repeats", "warmup", "batches", "callers", "evaluations", "cold_runs", "count_instructions", "tolerance",
    "check",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs what the arguments ask for; returns the exit status: 1 where a gate found a regression."""
    first, *rest = args.target or ["demo"]
    if first == "compare":
        return _compare(args, rest)
    if first == "show":
        if len(rest) != 1:
            raise ConfigError("show takes one record: twinflow-rt bench show FILE")
        from .record import load

        return _report(load(rest[0]), args)
    if rest:
        raise ConfigError(f"bench measures one model; got {' '.join(args.target)}")
    if args.target and args.random_weights:
        raise ConfigError(f"give a model ({first}) or --random-weights, not both")
    return _measure(first, args)


def _measure(model: str, args: argparse.Namespace) -> int:
    from rich.console import Console

    from .runner import run as measure

    for path in (args.json, args.html):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"folder {path.parent} does not exist; create it first")
    options: dict[str, Any] = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    console = Console(stderr=True)
    with console.status("measuring") as status:
        record = measure(model, command=repeatable(args), say=lambda text: status.update(f"measuring: {text}"), **options)
    return _report(record, args)


def _report(record: dict[str, Any], args: argparse.Namespace) -> int:
    from . import html, terminal
    from .record import save

    if args.json is not None and args.target[:1] != ["show"]:
        save(record, args.json)
    if args.html is not None:
        html.save(record, args.html)
    terminal.show(record)
    return 0


def _compare(args: argparse.Namespace, paths: list[str]) -> int:
    from .comparison import compare
    from .record import load
    from .terminal import show_comparison

    if len(paths) != 2:
        raise ConfigError("compare takes two records: twinflow-rt bench compare BEFORE AFTER")
    before, after = (load(path) for path in paths)
    result = compare(before, after, any_machine=args.any_machine, threshold=args.threshold)
    show_comparison(result)
    return 0 if not args.gate or result.gate() else 1


def repeatable(args: argparse.Namespace) -> str:
    """The command as others can repeat it: without the folders that a model lies in, and output files."""
    words = ["twinflow-rt", "bench", *(Path(target).name for target in args.target)]
    for name in SETTINGS:
        value = getattr(args, name)
        flag = {"count_instructions": "--instructions", "check": "--no-check"}.get(name, "--" + name.replace("_", "-"))
        if isinstance(value, tuple):
            words += [flag, ("x" if name == "size" else ",").join(map(str, value))]
        elif value is not None:
            words += [flag] if isinstance(value, bool) else [flag, str(value)]
    return shlex.join(words)
