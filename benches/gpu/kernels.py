"""Every op at its networks' sizes: each implementation checked against float64 arithmetic, then timed against
its ceiling and its rivals. An implementation that fails its check is reported and not timed.

    python -m benches.gpu.kernels OUT.json [--device cuda] [--dtypes ...] [--sizes ...] [--kinds ...] [--check-only]

The record is written anew after every case, so that a time limit costs only what was not reached.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benches.gpu import rivals
from benches.ops.case import SIZES, Case, judge, outputs
from benches.ops.eight_bit_cases import aimed, eight_bit_cases
from benches.ops.layer_cases import LAYERS
from benches.ops.op_cases import cases
from twinflow_rt import ops
from twinflow_rt.bench import ceilings, facts
from twinflow_rt.bench.timing import interleave
from twinflow_rt.config import dtype_name
from twinflow_rt.ops import Target
from twinflow_rt.ops.implementations import IMPLEMENTATIONS
from twinflow_rt.ops.selection import choose

COPY_SHARE = 0.8  # of the copy bandwidth, what an op that moves data should reach
FASTEST_SHARE = 0.95  # of the fastest implementation of an op with products, what the chosen one should reach
KINDS = ("ops", "layers", "rows")  # of cases: the table's elementwise ops, norms and attention; whole layers; 8 bits


def kind_of(case: Case) -> str:
    """One of `KINDS`."""
    if case.op in LAYERS:
        return "layers"
    return "ops" if hasattr(ops.EAGER, case.op) else "rows"


def check(case: Case, contenders: dict[str, Callable]) -> tuple[dict[str, Callable], dict[str, str]]:
    """Contenders that are right, and what is wrong with the others; each runs on inputs of its own."""
    reference = IMPLEMENTATIONS[case.op]["eager"].load()
    exact, eager = case.exact(*case.inputs()), case.read(reference(*case.inputs()))
    right, wrong = {}, {}
    for name, call in contenders.items():
        try:
            got = case.read(call(*case.inputs()))
        except Exception as error:  # a rival may raise anything; the others still run
            wrong[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        problem = _close(got, exact) if rivals.needs_rounded_weights(name) else judge(got, eager, exact)
        if problem is None:
            right[name] = call
        else:
            wrong[name] = problem
    return right, wrong


def _close(got: Any, exact: Sequence[torch.Tensor]) -> str | None:
    """Four units in the last place of the largest value, for rivals that read rounded weights."""
    for y, truth in zip(outputs(got), exact, strict=True):
        allowed = 4 * torch.finfo(y.dtype).eps * truth.abs().max().item()
        if not (worst := (y.double() - truth).abs().max().item()) <= allowed:
            return f"off by {worst:.3g}; allowed {allowed:.3g}"
    return None


def measure(
    case: Case, right: dict[str, Callable], device: torch.device, repeats: int, max_seconds: float
) -> dict[str, Any]:
    """Medians of interleaved runs with a cold L2, all contenders on the same inputs (consumed ones on copies)."""
    args = case.inputs()
    own = {name: rivals.clone(args) if case.in_place else args for name in right}
    calls = {name: lambda call=call, mine=own[name]: call(*mine) for name, call in right.items()}
    taken = interleave(
        calls, device=device, repeats=repeats, warmup=3, max_seconds=max_seconds, clock="device", flush_l2=True
    )
    return {name: {k: v for k, v in s.to_dict().items() if k != "samples"} for name, s in taken.items()}


def shares(case: Case, times: dict[str, Any], ceiling: ceilings.Ceilings | None, dtype: str) -> dict[str, Any]:
    """Per contender: achieved bytes/s and FLOP/s, and the share of the roofline of this run."""
    found = {}
    for name, time in times.items():
        entry = {"bytes_per_s": case.bytes / time["median"], "flops_per_s": case.flops / time["median"]}
        if ceiling is not None:
            entry["share"] = ceiling.seconds(case.flops, case.bytes, dtype) / time["median"]
        found[name] = entry
    return found


def verdict(
    case: Case, times: dict[str, Any], shares: dict[str, Any], ours: Sequence[str], chosen: str
) -> dict[str, bool]:  # fmt: skip
    """Which of the targets the chosen implementation meets; only targets that apply are named."""
    if chosen not in times:
        return {}
    mine, found = times[chosen]["median"], {}
    if case.flops:
        best = min(times[name]["median"] for name in (*ours, "eager") if name in times)
        found["chosen reaches 0.95x of the fastest backend"] = best / mine >= FASTEST_SHARE
    elif "share" in shares[chosen]:
        found["80 % of copy bandwidth"] = shares[chosen]["share"] >= COPY_SHARE
    if "compile" in times:
        found["not slower than torch.compile"] = mine <= times["compile"]["median"]
    if "torch" in times:
        found["not slower than torch's own"] = mine <= times["torch"]["median"]
    return found


def one(
    case: Case, size: str, dtype: torch.dtype, device: torch.device, options: argparse.Namespace,
    ceiling: ceilings.Ceilings | None,
) -> dict[str, Any]:  # fmt: skip
    """Checks, and unless only that was asked for times, one case; the entry of the record."""
    name = dtype_name(dtype)
    target = Target.of_network(SIZES[size], device, dtype)
    mine, refused = rivals.ours(case, target)
    others = {} if options.check_only else rivals.others(case.op, case.inputs(), options.without)
    right, wrong = check(case, {**mine, **others})
    chosen = choose(rivals.table_name(case), aimed(case, target)).chosen
    entry: dict[str, Any] = {
        "op": case.op, "case": case.name, "size": size, "dtype": name, "bytes": case.bytes, "flops": case.flops,
        "chosen": chosen, "right": sorted(right), "wrong": wrong, "refused": refused,
    }  # fmt: skip
    if not options.check_only:
        times = measure(case, right, device, options.repeats, options.max_seconds)
        entry["times"], entry["achieved"] = times, shares(case, times, ceiling, name)
        entry["targets"] = verdict(case, times, entry["achieved"], list(mine), chosen)
    return entry


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where one of the project's implementations gave a wrong result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    floats = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtypes", nargs="+", default=floats, choices=floats)
    parser.add_argument("--sizes", nargs="+", default=[n for n in SIZES if n != "tiny"], choices=list(SIZES))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--ops", nargs="+", help="default: all")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--without", nargs="+", default=[], metavar="RIVAL", help="eager, compile, torch or liger")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--max-seconds", type=float, default=4.0, help="of timing per case")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    # ceilings take large matrices: on a CPU, where only the kit itself is tried, there are none
    ceiling = ceilings.measure(device, options.dtypes) if device.type == "cuda" and not options.check_only else None
    record: dict[str, Any] = {
        "machine": facts.machine(device), "ceilings": ceiling.to_dict() if ceiling else None, "cases": [],
    }  # fmt: skip
    for size in dict.fromkeys(options.sizes):
        for dtype in options.dtypes:
            where = SIZES[size], getattr(torch, dtype), device
            for case in (*cases(*where), *eight_bit_cases(*where)):
                if kind_of(case) not in options.kinds or (options.ops and case.op not in options.ops):
                    continue
                with torch.inference_mode():
                    entry = one(case, size, getattr(torch, dtype), device, options, ceiling)
                record["cases"].append(entry)
                options.out.write_text(json.dumps(record, indent=1))
                print(f"{size:<22} {dtype:<9} {case.name:<20} right: {', '.join(entry['right']) or 'none'}", flush=True)
                for name, problem in entry["wrong"].items():
                    print(f"  {name}: {problem}", flush=True)
    return int(any(set(c["wrong"]) - set(rivals.NAMES) for c in record["cases"]))


if __name__ == "__main__":
    sys.exit(main())
