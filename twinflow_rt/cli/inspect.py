"""`twinflow-rt inspect`: what a model folder or an adapter holds, what an image costs, and what fits a card; no weight
is loaded."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..options import LoadOptions, read_arguments
from ..options import add_arguments as add_options
from .options import MODEL, parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help=f"{MODEL}; or an adapter (LoRA); with --cards also z-image, qwen-image, ...: their "
        "published configurations, all of them if left out",
    )  # fmt: skip
    add_options(parser, LoadOptions, only=("base", "files", "download"))
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="of the image whose work is counted")
    parser.add_argument("--tokens", type=int, metavar="N", help="length of its prompt (default: 32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    parser.add_argument("--ceilings", type=Path, metavar="RECORD", help="a bench's: state times for its machine, too")
    parser.add_argument(
        "--cards", action="store_true",
        help="print the plan that fits GPUs of 6, 8, 12, 16 and 24 GB: precision, what streams, tiles",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from ..bench import record
    from ..checkpoint.adapter_file import is_adapter
    from ..config import DTYPES
    from ..loading import open_model
    from ..planning.description import describe

    width, height = args.size or (None, None)
    if args.cards:
        return _print_cards(args, (height, width))
    if args.model is None:
        raise ConfigError("inspect needs a model; with --cards alone it tells of all published ones")
    if is_adapter(Path(args.model)):
        found = _describe_adapter(Path(args.model))
        print(json.dumps(found, indent=1) if args.json else "\n".join(f"{k:<8} {v}" for k, v in found.items()))
        return 0
    options: dict[str, Any] = {} if args.tokens is None else {"tokens": args.tokens}
    if args.dtype is not None:
        options["dtype"] = DTYPES[args.dtype]
    if args.ceilings is not None:
        options["ceilings"] = record.load(args.ceilings)["ceilings"]
    folder, files = open_model(args.model, read_arguments(args, LoadOptions))
    description = describe(folder, (height, width), files=files, **options)
    print(json.dumps(description.to_dict(), indent=1) if args.json else description)
    return 0


def _describe_adapter(path: Path) -> dict[str, Any]:
    """Return what an adapter's file holds: the published models that have all its layers, or most of them, kinds, ranks
    and alphas with the number of layers of each, the layers' names without numbers, bytes."""
    from ..bench.blueprints import BLUEPRINTS
    from ..checkpoint.adapter_file import AdapterFile, Targets
    from ..checkpoint.fuse import sources
    from ..checkpoint.lora import adapter_path
    from ..checkpoint.names import names_of
    from ..families import family_of

    file = AdapterFile(path := adapter_path(path))
    modules, likeness = [*file.modules.values()], {}
    for name, blueprint in BLUEPRINTS.items():
        family, raw = family_of(config := blueprint(1, None).transformer), config["_class_name"]
        tensors = family.build(family.config.from_dict(config)).state_dict()
        columns = {part: tensors[n].shape[1:].numel() for n in tensors for part in sources(n, family.layout.fused)}
        targets, fitting = Targets(columns, names_of(raw, config, columns)), 0
        for module, found in ((m, found) for m in modules if (found := targets.find(m.name))):
            with suppress(RuntimeError):  # shapes that do not fit each other
                fitting += 2 + (bool(module.factors) and columns[found[0][0]] == math.prod(module.shape()[1:]))
        likeness[name] = fitting
    best = max(likeness.values())
    counted: dict[str, Counter[Any]] = {
        "kind": Counter(("DoRA" if "magnitude" in m.keys else m.kind) for m in modules),
        "rank": Counter(m.rank for m in modules), "alpha": Counter(file.alpha(m, m.name) for m in modules),
        "targets": Counter(re.sub(r"(?<=[._])\d+(?=[._]|$)", "N", m.name) for m in modules),
    }  # fmt: skip
    what = {k: ", ".join(f"{x} ({n})" for x, n in counter.most_common()) for k, counter in counted.items()}
    likely = " or ".join(name for name, fits in likeness.items() if fits == best > 0) or "none of the supported ones"
    text = {"left out": f"{len(file.text)} tensors of text encoders"} if file.text else {}
    return {"family": likely, **what, "bytes": path.stat().st_size, **text}


def _print_cards(args: argparse.Namespace, size: tuple[int | None, int | None]) -> int:
    """Print what fits which card: of the model asked for, else of all that have published configurations."""
    from ..bench.blueprints import BLUEPRINTS
    from ..bench.random_weights import temporary
    from ..loading import open_model
    from ..planning.cards import count, fits, table

    found = []
    for name in BLUEPRINTS if args.model is None else [args.model]:
        if name in BLUEPRINTS:
            with temporary(name) as folder:
                found += fits(name, *count(folder, size))
        else:
            folder, files = open_model(name, read_arguments(args, LoadOptions))
            found += fits(name, *count(folder, size, files))
    print(json.dumps(found, indent=1) if args.json else table(found))
    return 0
