"""Runs the cases and writes one JSON record (see the package's docstring)."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import torch

from twinflow_rt.bench import ceilings, facts
from twinflow_rt.bench.timing import Samples
from twinflow_rt.config import has_native

from .cases import CASES, DEFAULT, PEERS, Case, applies
from .contenders import flops
from .goals import after_pause, judge

REFERENCE = "diffusers"
# relative rms against the reference; float32 peers get EXACT
TOLERANCE = {"ours-int8": 5e-2, "ours-bf16": 5e-2, "openvino-bf16": 5e-2}
EXACT = 1e-4
PAUSE = 0.05  # seconds before each turn


class Worker:
    """A peer's process. Raises RuntimeError with its last words where it ends."""

    def __init__(self, peer: str, case: Case, folder: Path, threads: int) -> None:
        task = {
            "peer": peer, "part": case.part, "folder": str(folder), "size": case.size, "threads": threads,
            "steps": case.steps,
            "origin": time.monotonic(),
        }  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.errors = TemporaryFile("w+")  # noqa: SIM115 (open until `close`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benches.peers.worker", json.dumps(task)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment,
        )  # fmt: skip

    def ask(self, *words: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"the peer's process ended: {' '.join(self.errors.read().split()[-60:])}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def run_case(name: str, peers: list[str], rounds: int, seconds: float, threads: int) -> dict[str, Any]:
    """One case: first images, outputs compared, rounds, memory; between two measurements of the machine."""
    case, result = CASES[name], {}
    with ExitStack() as stack:
        folder = stack.enter_context(case.folder())
        before = ceilings.measure("cpu", ["float32"])
        workers: dict[str, Worker] = {}
        for peer in peers:
            if not applies(peer, case.part):
                continue
            worker = Worker(peer, case, folder, threads)
            stack.callback(worker.close)
            try:
                first = worker.ask("first")
            except RuntimeError as error:
                result[peer] = {"absent": str(error)}
                print(f"{name}: {peer} is absent: {error}", flush=True)
                continue
            workers[peer], result[peer] = worker, {"first_output_seconds": first["seconds"]}
            print(f"{name}: {peer} first output after {first['seconds']:.2f} s", flush=True)
        _compare(workers, result)
        samples = _rounds(workers, case, rounds, seconds)
        for peer, worker in workers.items():
            result[peer] |= {"peak_rss_bytes": worker.ask("peak")["bytes"]}
            result[peer] |= {figure: _samples(turns) for figure, turns in samples[peer].items()}
        ceiling = before.best(ceilings.measure("cpu", ["float32"]))
        _derive(result, flops(case.part, folder, case.size), ceiling.gemm["float32"])
    return {"ceiling_flops": ceiling.gemm["float32"], "peers": result}


def _compare(workers: dict[str, Worker], result: dict[str, Any]) -> None:
    """Relative rms of every peer's output against the reference's; a peer that is off is not timed."""
    with TemporaryDirectory() as folder:
        outputs = {}
        for peer, worker in workers.items():
            worker.ask("output", "total", f"{folder}/{peer}")
            outputs[peer] = torch.load(f"{folder}/{peer}", weights_only=True).double()
    if REFERENCE not in outputs:
        raise SystemExit(f"outputs are compared with {REFERENCE}, which is not among the peers that run")
    exact = outputs[REFERENCE]
    for peer, output in outputs.items():
        error = float((output - exact).norm() / exact.norm())
        result[peer]["relative_rms_error"] = error
        if not error <= TOLERANCE.get(peer, EXACT):
            result[peer]["absent"] = f"output is off by {error:.2e}: not timed"
            del workers[peer]


def _rounds(
    workers: dict[str, Worker], case: Case, rounds: int, seconds: float
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """The turns of each peer and figure."""
    figures = ("total", "network") if case.part == "image" else ("total",)
    samples: dict[str, dict[str, list[dict[str, float]]]] = {peer: {f: [] for f in figures} for peer in workers}
    order, begin = list(workers), time.perf_counter()
    for figure in figures[1:]:  # totals are warm from the first output and the one that was compared
        for peer in order:
            workers[peer].ask("turn", figure, 0)
    for n in range(1, rounds + 1):
        if n > 3 and time.perf_counter() - begin > seconds:
            break
        random.Random(n).shuffle(order)
        for figure in figures:
            for peer in order:
                time.sleep(PAUSE)
                samples[peer][figure].append(workers[peer].ask("turn", figure, n))
    return samples


def _samples(turns: list[dict[str, float]]) -> dict[str, Any]:
    """The figure, and its calls after a pause where every turn has one."""
    figure = Samples(tuple(turn["seconds"] for turn in turns)).to_dict()
    first = tuple(turn["after_pause"] for turn in turns if "after_pause" in turn)
    return {**figure, "after_pause": Samples(first).to_dict()} if len(first) == len(turns) else figure


def _derive(result: dict[str, Any], work: dict[str, int], ceiling: float) -> None:
    """Ratios over ours, and rates as a share of the machine's float32 matrix product rate."""
    for found in result.values():
        for figure in ("total", "network"):
            if figure not in found:
                continue
            ours = result.get("ours", {}).get(figure)
            first = found[figure].get("after_pause"), None if ours is None else after_pause(ours)
            for timed, mine in ((found[figure], ours), first):
                if timed is not None and figure in work:
                    rate = work[figure] / timed["median"]
                    timed |= {"flops": work[figure], "share_of_float32_gemm": rate / ceiling}
                if timed is not None and mine is not None:
                    timed["ours_is_faster_by"] = timed["median"] / mine["median"]


def _table(name: str, case: dict[str, Any]) -> str:
    lines = [f"{name}  (float32 matrix products: {case['ceiling_flops'] / 1e9:.0f} GFLOP/s; [after a pause])"]
    for peer, found in case["peers"].items():
        if "total" not in found:
            lines.append(f"  {peer:<18} {found['absent'][:150]}")
            continue
        total, network = found["total"], found.get("network", found["total"])
        share = network.get("share_of_float32_gemm", float("nan"))
        lines.append(
            f"  {peer:<18} {1e3 * total['median']:9.1f} ms +- {1e3 * total['mad']:.1f} [{_bracket(total)}]"
            f" (ours is x{total.get('ours_is_faster_by', float('nan')):.2f})"
            f"  network {1e3 * network['median']:9.1f} ms [{_bracket(network)}] ({share:.0%} of gemm)"
            f"  first {found['first_output_seconds']:.1f} s  peak {found['peak_rss_bytes'] / 1e6:,.0f} MB"
            f"  error {found['relative_rms_error']:.1e}"
        )
    return "\n".join(lines)


def _bracket(figure: dict[str, Any]) -> str:
    if "after_pause" not in figure:
        return "the same"
    first = figure["after_pause"]
    return f"{1e3 * first['median']:.1f} +- {1e3 * first['mad']:.1f}"


def import_ratio(repeats: int = 5) -> dict[str, float]:
    """Median seconds of a process that imports torch, and of one that imports this package, in turns."""
    taken: dict[str, list[float]] = {"torch": [], "twinflow_rt": []}
    for _ in range(repeats):
        for module, seconds in taken.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            seconds.append(time.perf_counter() - begin)
    medians = {module: statistics.median(seconds) for module, seconds in taken.items()}
    return {**medians, "ratio": medians["twinflow_rt"] / medians["torch"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.peers", description="This runtime beside its CPU peers.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(DEFAULT))
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, help="default: all; in bfloat16 where the CPU multiplies it"
    )
    parser.add_argument("--rounds", type=int, default=60, help="turns of each peer (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=40, help="per case; then only the first three rounds begin")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bfloat16 = has_native(torch.bfloat16, torch.device("cpu"))
    selected = args.peers or [peer for peer in PEERS if bfloat16 or not peer.endswith("-bf16")]
    command = " ".join(["python -m benches.peers", *sys.argv[1:]])
    record: dict[str, Any] = {"command": command, "machine": facts.machine("cpu")}
    record |= {"import_seconds": import_ratio(), "cases": {}}
    for name in args.cases:
        record["cases"][name] = run_case(name, selected, args.rounds, args.seconds, args.threads)
        print(_table(name, record["cases"][name]), flush=True)
    verdicts = judge(record)
    record["goals"] = [verdict.to_dict() for verdict in verdicts]
    print("goals", *verdicts, sep="\n")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
