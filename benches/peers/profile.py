"""Where an image's time goes, ours beside OpenVINO, in CPU time of one thread: also on a machine that does other work.

    python -m benches.peers.profile [--case demo] [--calls 60]

Both run in this process, in turns, with a new prompt in every call; of each stage the least time of all calls is
printed. OpenVINO is called by the same pipeline, from its network as one graph: what ours computes of the prompt
within "text" (the context refiner) is in its "sample". Then our ops, of one stage after the other: calls in an
image, median and product, of torch's ops and of the native kernels; the rest of a stage is Python.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from twinflow_rt import load
from twinflow_rt.bench.workload import Workload, stages
from twinflow_rt.ops.native import library

from . import contenders
from .cases import CASES, PROMPTS, SEED, Case

Call = Callable[[int], Any]


def pipelines(name: str) -> Iterator[tuple[str, Any, Any]]:
    """name, pipeline, its mode of autograd."""
    case = CASES[name]
    with case.folder() as folder:
        yield "ours", load(folder, device="cpu", dtype=torch.float32), torch.inference_mode
        kept: list[Any] = []
        with patch.object(contenders, "_ours", lambda pipe, *_: kept.append(pipe) or {"total": None}):
            contenders.image("openvino", folder, case.size, case.steps)
        yield "openvino", kept[0], torch.no_grad


def by_stage(found: list[tuple[str, Any, Any]], case: Case, calls: int) -> dict[str, dict[str, float]]:
    """Least milliseconds of every stage and of the call, by pipeline."""
    least: dict[str, dict[str, float]] = {name: defaultdict(lambda: float("inf")) for name, *_ in found}
    for n in range(calls):
        for name, pipe, mode in found:
            side = pipe.sizes.resolve(case.size, case.size)[0]
            with mode(), patch.object(time, "perf_counter", time.process_time):
                begin = time.perf_counter()
                prompt = PROMPTS.format(n=n)
                timings = pipe(prompt, height=side, width=side, seed=SEED, nfe=case.steps, output="pt").timings
                taken = {**timings, "in all": time.perf_counter() - begin}
            for stage, seconds in taken.items():
                least[name][stage] = min(least[name][stage], 1e3 * seconds)
    return least


@contextmanager
def kernels_timed(samples: dict[str, list[float]]) -> Iterator[None]:
    """While entered, every call of a native kernel leaves its microseconds in `samples`."""
    native = library.load("cpu")
    plain = {name: kernel for name in dir(native) if callable(kernel := getattr(native, name)) and name[0] != "_"}

    def timed(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            answer = kernel(*arguments)
            samples[f"native {name}"].append(1e6 * (time.perf_counter() - begin))
            return answer

        return call

    with patch.multiple(native, **{name: timed(name, kernel) for name, kernel in plain.items()}):
        yield


def by_op(stage: Call, calls: int) -> list[tuple[float, float, str]]:
    """Calls in one run of a stage and median microseconds, of each op that no other op calls; the costliest first."""
    samples: dict[str, list[float]] = defaultdict(list)
    stage(0)
    with torch.inference_mode(), kernels_timed(samples), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for n in range(calls):
            stage(n)
    for event in profiler.events():
        if event.cpu_parent is None:
            samples[event.name].append(event.cpu_time_total)
    rows = [(len(taken) / calls, statistics.median(taken), name) for name, taken in samples.items()]
    return sorted(rows, key=lambda row: -row[0] * row[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.peers.profile", description=__doc__.splitlines()[0])
    images = [name for name, case in CASES.items() if case.part == "image"]
    parser.add_argument("--case", choices=images, default="demo")
    parser.add_argument("--calls", type=int, default=60, help="of each (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, case = list(pipelines(args.case)), CASES[args.case]
    least = by_stage(found, case, args.calls)
    print(f"{args.case}: ms of CPU time, one thread" + "".join(f"{name:>12}" for name in least))
    for stage in least["ours"]:
        print(f"  {stage:<32}" + "".join(f"{taken[stage]:12.2f}" for taken in least.values()))
    pipe = found[0][1]
    side = pipe.sizes.resolve(case.size, case.size)[0]
    for name, stage in stages(pipe, Workload((PROMPTS.format(n=0),), side, side, SEED, case.steps or 1)).items():
        rows = by_op(torch.inference_mode()(lambda n, stage=stage: stage()), args.calls)
        print(f"{name}: {sum(calls * each for calls, each, _ in rows) / 1e3:.2f} ms in ops")
        for calls, each, op in rows[:8]:
            print(f"  {calls:6.1f} x {each:9.1f} us = {calls * each / 1e3:8.2f} ms  {op}")


if __name__ == "__main__":
    main()
