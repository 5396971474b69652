"""Generates for a long time and watches what grows.

    python -m tests.reliability.leaks [--runs 2000]       (make leaks)

The demo model, in every way that holds something for a while: sizes, batches, prompts of several lengths,
schedules, outputs, cancels at every stage, failing callbacks, split batches, a bounded prompt cache. After a
warm-up that sees each kind once, the process may grow by `RESIDENT` bytes, and neither by an open file, a
thread, nor a live tensor; caches stay within their bounds. Prints the figures as JSON; exit code 1 if one is over.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from twinflow_rt.errors import CancelledError
from twinflow_rt.host_memory import release_free_memory, resident_bytes
from twinflow_rt.loading import load
from twinflow_rt.pipeline import Pipeline

RUNS, KINDS = 2000, 24
RESIDENT = 16 << 20  # bytes; a leak of 64 KB per generation, one latent batch, would be 128 MB after 2,000
CACHE = 1 << 20
TAILS = ("", ", and a very long description of everything that is beside it")
PROMPTS = [f"a {color} {shape}{tail}" for color in ("red", "blue") for shape in ("circle", "square") for tail in TAILS]


class Stop(Exception):
    """Raised by a callback."""


def kinds() -> list[dict[str, Any]]:
    """Ways to call a pipeline; the same list every time, so that a warm-up sees all of them."""
    draw = random.Random(0)
    return [
        {
            "height": draw.choice([32, 40, 64, 96]), "width": draw.choice([32, 64, 72]),
            "nfe": draw.choice([1, 1, 1, 2, 4]), "num_images": draw.choice([1, 1, 2, 3]),
            "output": draw.choice(["pil", "np", "pt", "latent"]),
            "stop": draw.choice([None, None, 0, 1, 2, 3, 4, "callback", "split"]),
        }
        for _ in range(KINDS)
    ]  # fmt: skip


def generate(pipe: Pipeline, kind: dict[str, Any], seed: int) -> bool:
    """One call; whether it came to its end."""
    options = dict(kind)
    stop, asked = options.pop("stop"), []

    def cancel() -> bool:
        asked.append(1)
        return isinstance(stop, int) and len(asked) > stop

    def callback(done: int, total: int, x0: torch.Tensor) -> None:
        if stop == "callback":
            raise Stop

    prompts = random.Random(seed).sample(PROMPTS, 1 + seed % 3)
    pipe.batch_invariant = stop == "split"
    try:
        pipe(prompts, seed=seed, cancel=cancel, callback=callback, on_oom="split", **options)
    except (CancelledError, Stop):
        return False
    return True


def held(pipe: Pipeline) -> dict[str, int]:
    """What could grow, now; without recordings, of which there are more as shapes come again, up to their bound."""
    if pipe.captures is not None:
        pipe.captures.clear()
    gc.collect()
    release_free_memory()
    files = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    return {
        "resident": resident_bytes(), "files": len(os.listdir(files)), "threads": threading.active_count(),
        "tensors": sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()),
        "prompts": pipe.prompts.bytes,
    }  # fmt: skip


def watch(runs: int, tell: Callable[[int, dict[str, int]], None] | None = None) -> dict[str, Any]:
    """Generates `runs` times after a warm-up of every kind. Returns what was held before and after, what is
    `over` its bound, and how many calls `finished`."""
    pipe, calls = load("demo", device="cpu", prompt_cache=CACHE), kinds()
    for seed in range(3 * KINDS):
        generate(pipe, calls[seed % KINDS], seed)
    before, finished = held(pipe), 0
    for run in range(runs):
        finished += generate(pipe, calls[run % KINDS], run)
        if tell is not None and runs >= 10 and run % (runs // 10) == 0:
            tell(run, held(pipe))
    after = held(pipe)
    bounds = {**before, "resident": before["resident"] + RESIDENT, "prompts": CACHE, "tensors": before["tensors"] + 64}
    over = [f"{name}: {after[name]} > {bound}" for name, bound in bounds.items() if after[name] > bound]
    return {"runs": runs, "finished": finished, "before": before, "after": after, "over": over}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS)
    args = parser.parse_args()
    report = watch(args.runs, lambda run, now: print(run, json.dumps(now), file=sys.stderr, flush=True))
    print(json.dumps(report, indent=1))
    return 1 if report["over"] else 0


if __name__ == "__main__":
    sys.exit(main())
