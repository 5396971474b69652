"""What runs in a process of its own: a cold start, or images whose instructions are counted.

    python -m twinflow_rt.bench.probe '{"kind": "cold", ...}'

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
from .timeline import Timeline

PHASES = ("start", "import", "load", "compile", "first_image")


@dataclass(frozen=True)
class Task:
    """kind: "cold" or "instructions". control: see `counting`. Everything else as `twinflow_rt.load` and
    a call take it; threads: of torch on the CPU."""

    kind: str
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
    images: int = 1
    control: dict[str, str] | None = None


def run(task: Task, wrapper: tuple[str, ...] = (), timeout: float = 1800) -> dict[str, Any]:
    """Runs `task` in a fresh interpreter (started by `wrapper`, if any) and returns what it prints.

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
    """Seconds from the start of the process, by phase, and its memory over time.

    load: reading text encoder and decoder; compile: `compile_network` or, for an artifact,
    `load_program`, which read the network's weights as they go. A second image follows, for comparison.
    """
    with Timeline(origin) as timeline:
        timeline.mark("start")
        from .. import loading
        from ..runtime.timer import synchronize

        timeline.mark("import")

        def marked(function: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                timeline.mark("load")
                result = function(*args, **options)
                synchronize(task.device)
                timeline.mark("compile")
                return result

            return call

        for name in ("compile_network", "load_program"):
            setattr(loading, name, marked(getattr(loading, name)))
        generate = _generator(task)
        synchronize(task.device)
        timeline.mark("load")
        generate()
        timeline.mark("first_image")
        generate()
        timeline.mark("warm_image")
    seconds, before = dict.fromkeys((*PHASES, "warm_image"), 0.0), 0.0
    for end, phase in timeline.marks:
        seconds[phase] += end - before
        before = end
    return {"phases": seconds, "timeline": timeline.to_dict()}


def instructions(task: Task) -> dict[str, Any]:
    """Runs images while the tool around this process counts; `images` of them, after one that is not counted."""
    generate = _generator(task)
    generate()
    generate()
    control = task.control or {}
    _tell(control, "enable")
    for _ in range(task.images):
        generate()
    _tell(control, "disable")
    return {"images": task.images}


def _generator(task: Task) -> Any:
    import torch

    torch.set_num_threads(task.threads)
    from ..loading import load
    from . import random_file  # noqa: F401  the model may be made of random weights

    pipe = load(task.model, device=task.device, dtype=task.dtype, precision=task.precision, nfe=task.nfe)
    return lambda: pipe(task.prompt, seed=task.seed, width=task.width, height=task.height)


def _tell(control: dict[str, str], word: str) -> None:
    """Switches the counter on or off: perf by its control pipe, callgrind by its own command."""
    if "callgrind" in control:
        state = "on" if word == "enable" else "off"
        command = [control["callgrind"], f"--instr={state}", str(os.getpid())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    elif "perf" in control:
        with open(control["perf"], "w") as pipe:
            pipe.write(word + "\n")
        with open(control["ack"]) as pipe:
            pipe.readline()


if __name__ == "__main__":
    raw = json.loads(sys.argv[1])
    began = raw.pop("origin")
    asked = Task(**raw)
    print(json.dumps(cold(asked, began) if asked.kind == "cold" else instructions(asked)))
