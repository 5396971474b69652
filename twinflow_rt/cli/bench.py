"""`twinflow-rt bench`: MODEL measures, `compare A B` judges two records, `show A` prints one again."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import check_target
from ..errors import ConfigError, require_extra
from ..options import LoadOptions
from ..options import add_arguments as add_options
from .options import parse_size
from .progress import doing

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


OF_LOAD: dict[str, Any] = {}  # stands for: as `LoadOptions` declares it
# group -> option -> what argparse is told. Options without a default leave the choice to `settings.Settings`.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "what is measured": {
        "random-weights": {"metavar": "NAME", "help": "without files: z-image, qwen-image, sd3.5-m, sana, sana-sprint"},
        "scale": {"type": float, "help": "with --random-weights: factor on all widths, for small machines"},
        "layers": {"type": int, "help": "with --random-weights: at most so many layers per network"},
        "size": {"type": parse_size, "metavar": "WxH", "help": "pixels; default: the model's"},
        "batch": {"type": int, "help": "images per call (default 1)"},
        **dict.fromkeys(("base", "files", "nfe", "dtype", "precision", "device"), OF_LOAD),
        "backend": {"metavar": "NAME", "help": "implementation to prefer: eager, native, triton, cuda, cudnn, ..."},
        "peers": {"type": names, "metavar": "LIST", "help": "compare with some of eager,compile,diffusers"},
        "prompt": {"help": "default: built-in ones"},
        "seed": {"type": int, "help": "of the first image (default 0)"},
    },
    "how it is measured": {
        "repeats": {"type": int, "help": "rounds (default 20)"},
        "warmup": {"type": int, "help": "unmeasured rounds before (default 3)"},
        "batches": {"type": counts, "metavar": "LIST", "help": "batch sizes to time (default 1,2,4; '' for none)"},
        "evaluations": {"type": counts, "metavar": "LIST", "help": "per image, to time (default 1,2,4; '' for none)"},
        "cold-runs": {"type": int, "metavar": "N", "help": "fresh processes for the cold start (default 3; 0: none)"},
        "tolerance": {"type": float, "help": "accept outputs of at most this rms error instead of the error rule"},
        "no-check": {
            "action": "store_false", "default": None, "dest": "check",
            "help": "do not compare outputs with the float32 reference; forbids --peers",
        },
    },
    "reports": {
        "json": {"type": Path, "metavar": "FILE", "help": "write the record"},
        "html": {"type": Path, "metavar": "FILE", "help": "write the page with plots"},
    },
    "compare": {
        "gate": {"action": "store_true", "help": "exit with 1 if a speed-up got worse"},
        "any-machine": {"action": "store_true", "help": "compare records of different machines all the same"},
        "threshold": {"type": float, "default": 0.03, "help": "change that runs differ by (default %(default)s)"},
    },
}  # fmt: skip
SETTINGS = tuple(
    told.get("dest", option.replace("-", "_"))
    for group in ("what is measured", "how it is measured")
    for option, told in OPTIONS[group].items()
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument(
        "target", nargs="*", metavar="MODEL | compare A B | show A",
        help="model folder or 'demo' (default); or two records to compare; or a record to show",
    )  # fmt: skip
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option, told in options.items():
            if told is OF_LOAD:
                add_options(group, LoadOptions, only=(option,))
            else:
                group.add_argument(f"--{option}", **told)


def run(args: argparse.Namespace) -> int:
    """Run what the arguments ask for; return the exit status: 1 where a gate found a regression."""
    first, *rest = args.target or ["demo"]
    if first == "compare":
        return _compare(args, rest)
    if first == "show":
        if len(rest) != 1:
            raise ConfigError("show takes one record: twinflow-rt bench show FILE")
        from ..bench.record import load

        return _report(load(rest[0]), args)
    if rest:
        raise ConfigError(f"bench measures one model; got {' '.join(args.target)}")
    if args.target and args.random_weights:
        raise ConfigError(f"give a model ({first}) or --random-weights, not both")
    return _measure(first, args)


def _measure(model: str, args: argparse.Namespace) -> int:
    for option, path in (("--json", args.json), ("--html", args.html)):
        if path is not None:
            check_target(path, option)
    if args.html is not None:
        require_extra("--html", "report", "matplotlib", "scipy")
    if args.peers:
        require_extra("--peers", "report", "scipy")
    if "diffusers" in (args.peers or ()):
        require_extra("the diffusers peer", "train", "diffusers", "transformers")
    from ..bench.runner import run as measure

    options: dict[str, Any] = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    with doing(f"measuring {args.random_weights or model}") as tell:
        record = measure(model, command=repeatable(args), say=tell, **options)
    return _report(record, args)


def _report(record: dict[str, Any], args: argparse.Namespace) -> int:
    from ..bench import html, terminal
    from ..bench.record import save

    if args.json is not None and args.target[:1] != ["show"]:
        save(record, args.json)
    if args.html is not None:
        html.save(record, args.html)
    terminal.show(record)
    return 0


def _compare(args: argparse.Namespace, paths: list[str]) -> int:
    from ..bench.comparison import compare
    from ..bench.record import load
    from ..bench.terminal import show_comparison

    if len(paths) != 2:
        raise ConfigError("compare takes two records: twinflow-rt bench compare BEFORE AFTER")
    before, after = (load(path) for path in paths)
    result = compare(before, after, any_machine=args.any_machine, threshold=args.threshold)
    show_comparison(result)
    return 0 if not args.gate or result.gate() else 1


def repeatable(args: argparse.Namespace) -> str:
    """Return the command as others can repeat it: without the folders that a model lies in, and output files."""
    words = ["twinflow-rt", "bench", *(Path(target).name for target in args.target)]
    for name in SETTINGS:
        value = getattr(args, name)
        flag = "--no-check" if name == "check" else "--" + name.replace("_", "-")
        if name in ("base", "files"):
            words += [flag, *(Path(path).name for path in ([value] if name == "base" else value))] if value else []
        elif isinstance(value, tuple):
            words += [flag, ("x" if name == "size" else ",").join(map(str, value))]
        elif value is not None:
            words += [flag] if isinstance(value, bool) else [flag, str(value)]
    return shlex.join(words)
