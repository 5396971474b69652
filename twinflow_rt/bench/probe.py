"""A cold start, measured in a process of its own.

    python -m twinflow_rt.bench.probe '{"model": "demo", ...}'

Prints one JSON object as the last line of stdout. `Task` says what it takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import TwinFlowError

PHASES = ("start", "import", "load", "compile", "first_image")


@dataclass(frozen=True)
class Task:
    """What is loaded and called, as `twinflow_rt.load` and a call take it. threads: of torch on the CPU."""

    model: str
    device: str
    dtype: str | None
    precision: str | None
    nfe: int
    prompt: str
    seed: int
    width: int | None
    height: int | None
    threads: int
    base: str | None = None
    files: tuple[str, ...] = ()


def run(task: Task, wrapper: tuple[str, ...] = (), timeout: float = 1800) -> dict[str, Any]:
    """Run `task` in a fresh interpreter and return what it prints. wrapper: a command that starts the interpreter.

    Raises TwinFlowError with the end of its stderr if it fails.
    """
    content = json.dumps({**asdict(task), "origin": time.monotonic()})
    command = [*wrapper, sys.executable, "-m", "twinflow_rt.bench.probe", content]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": str(task.threads)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    if done.returncode != 0:
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise TwinFlowError(f"the measuring process ended with status {done.returncode}: {last}")
    printed: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return printed


def cold(task: Task, origin: float) -> dict[str, Any]:
    """Return the seconds of each phase of a process until its second image, by phase.

    origin: time.monotonic() when the process was started. load: opening the model, reading text encoder and decoder;
    compile: from the network's first tensor until the decoder's, the passes between them. A second image follows,
    for comparison.
    """
    seconds, before = dict.fromkeys((*PHASES, "warm_image"), 0.0), origin

    def end(phase: str) -> None:
        """Add the seconds since the last phase ended to `phase`."""
        nonlocal before
        now = time.monotonic()
        seconds[phase] += now - before
        before = now

    end("start")
    import torch

    from ..loading import load
    from ..runtime.timer import synchronize
    from . import random_file  # noqa: F401  the model may be made of random weights

    end("import")
    torch.set_num_threads(task.threads)
    seen = "text encoder"

    def progress(part: str, _: int) -> None:
        """End a phase where `load` goes on to another network."""
        nonlocal seen
        if part != seen:
            synchronize(task.device)
            end("compile" if seen == "transformer" else "load")
            seen = part

    options: dict[str, Any] = {name: getattr(task, name) for name in ("base", "files", "dtype", "precision", "nfe")}
    pipe = load(task.model, device=task.device, progress=progress, **options)
    synchronize(task.device)
    end("load")
    for phase in ("first_image", "warm_image"):
        pipe(task.prompt, seed=task.seed, width=task.width, height=task.height)
        end(phase)
    return {"phases": seconds}


if __name__ == "__main__":
    raw = json.loads(sys.argv[1])
    began = raw.pop("origin")
    print(json.dumps(cold(Task(**raw), began)))
