"""`twinflow-rt sensitivity`: what linear layers of 8 or 4 bits, or bfloat16, cost and gain on this device."""

from __future__ import annotations

import argparse
import json

from ..options import LoadOptions
from ..options import add_arguments as add_options
from .options import MODEL, load_model
from .progress import doing

MEASURED = ("int8", "fp8", "int4", "bf16")  # as planning.precision, whose import takes seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    add_options(parser, LoadOptions, only=("base", "files", "device", "dtype", "download"))
    parser.add_argument("--precision", choices=MEASURED, help="default: fp8 on a GPU, int8 on a CPU")
    parser.add_argument(
        "--budget", type=float,
        help="error of one forward to stay within; default: 0.06 for fp8, 0.1 for int4, else 0.03",
    )  # fmt: skip
    parser.add_argument(
        "--save", nargs="?", const="", metavar="FILE",
        help="write the measurement to FILE, for load(..., skip_layers=FILE) and --skip-layers FILE; without FILE to "
        "the user's cache, where precision 'auto' finds it",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the measurement as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print the groups and which layers to skip, and keep it if asked to."""
    from ..loading import load
    from ..passes.layer_groups import treatment
    from ..planning import precision as precisions
    from ..planning import sensitivity

    if args.save is not None:
        precisions.check_save(args.save or None)
    pipe = load_model(args, precision=None)
    precision = args.precision or ("fp8" if pipe.device.type == "cuda" else "int8")
    with doing(f"measuring {precision}, one kind of layers after the other"):
        if precision == "bf16":
            options = {"base": args.base, "files": args.files, "device": pipe.device, "sampler": pipe.sampler}
            reload = lambda dtype: load(args.model, dtype=dtype, **options)
            found = sensitivity.of_bfloat16(pipe, reload, args.budget)
        else:
            found = sensitivity.of_pipeline(pipe, precision, args.budget)
    where = None if args.save is None else precisions.save(found, args.save or None)
    if args.json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    for group in found.groups:
        print(f"{group}{treatment(group, found.skip_layers)}")
    names = ", ".join(f'"{name}"' for name in found.skip_layers)
    skipped = "" if precision == "bf16" else f", skip_layers=[{names}]"
    print(f'load(..., precision="{precision}"{skipped}): error {found.error:.2e} of at most {found.budget:g}')
    gain = found.seconds_before / found.seconds
    print(f"one evaluation {1e3 * found.seconds:.3g} ms, {gain:.2f}x as fast as {found.dtype} on {found.device}")
    if where is not None:
        print(f"wrote {where}")
    return 0
