"""`twinflow-rt kernels`: every op, every implementation of it, and why one cannot be used here."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One implementation of one op; `reason` is None where it can run, `rank` None where it is not tried."""

    op: str
    name: str
    rank: int | None
    chosen: bool
    reason: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--head-dim", type=int, help="of the attention, for backends that take only some")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..ops import Target

    try:  # a device this machine lacks is welcome: the refusals say so
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {args.device}: {error}") from None
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"--dtype {args.dtype}: use float32, bfloat16 or float16")
    if args.head_dim is not None and args.head_dim < 1:
        raise ConfigError(f"--head-dim {args.head_dim}: must be 1 or more")
    target = Target.of(device, dtype, args.head_dim)
    report = {"machine": machine(), "packages": packages(), "target": describe(target)}
    rows = inventory(target)
    if args.json:
        print(json.dumps({**report, "ops": [asdict(row) for row in rows]}, indent=1))
    else:
        show(report, rows)
    return 0


def inventory(target: Any) -> list[Row]:
    """Return all implementations of all ops: first the ranked ones in order, then `eager`, then the rest."""
    from ..ops.implementations import IMPLEMENTATIONS
    from ..ops.selection import choose, rank

    rows = []
    for op, implementations in IMPLEMENTATIONS.items():
        order, chosen = (*rank(op, target), "eager"), choose(op, target).chosen
        for name in dict.fromkeys((*order, *implementations)):
            place = order.index(name) + 1 if name in order else None
            rows.append(Row(op, name, place, name == chosen, implementations[name].refuses(target)))
    return rows


def machine() -> dict[str, Any]:
    """Return the versions and devices that decide what can run."""
    import torch

    from ..ops.native import library

    devices = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"{properties.major}.{properties.minor}"
        devices.append({"name": properties.name, "capability": capability, "bytes": properties.total_memory})
    extension = library.load("cpu")
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "devices": devices,
        "native": extension if isinstance(extension, str) else f"{extension.isa} instructions",
        "cuda_library": library.unusable_reason() or "usable",
    }


def packages() -> list[dict[str, Any]]:
    """Return the optional packages that implementations come from; imports each, to find broken ones."""
    from ..ops import optional
    from ..ops.backends import BACKENDS

    modules = ("triton", *(b.module for b in BACKENDS.values() if b.module))
    return [asdict(optional.find(module)) for module in modules]


def describe(target: Any) -> dict[str, Any]:
    from ..config import dtype_name

    return {**asdict(target), "dtype": dtype_name(target.dtype)}


def show(report: dict[str, Any], rows: list[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, facts, target = Console(), report["machine"], report["target"]
    devices = ", ".join(f"{d['name']} ({d['capability']})" for d in facts["devices"]) or "no GPU"
    console.print(f"torch {facts['torch']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}; {devices}", highlight=False)
    console.print(f"native: {facts['native']}; GPU library: {facts['cuda_library']}", highlight=False)
    for package in report["packages"]:
        state = package["problem"] or f"{package['module']} {package['version'] or ''}: usable"
        console.print(escape(state), style="bold red" if package["broken"] else None, highlight=False)
    arch = f", compute capability {target['arch'] / 10:.1f}" if target["arch"] else ""
    table = Table(title=f"{target['dtype']} on {target['device']}{arch}", title_justify="left")
    for column in ("op", "implementation", "here"):
        table.add_column(column, overflow="fold", no_wrap=column == "op")
    previous = None
    for row in rows:
        state = escape(row.reason or ("usable" if row.rank else "usable, not tried"))
        first = row.op if row.op != previous else ""
        table.add_row(first, row.name, "[bold]chosen[/]" if row.chosen else state, style="dim" if row.reason else None)
        previous = row.op
    console.print(table)
