"""Instructions per image: a figure that other load on the machine does not move.

perf reads the processor's counter where there is one; valgrind's callgrind counts by simulation (about
fifty times slower, with AVX-512 hidden from the program). Both count images only, not the start.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import TwinFlowError
from .probe import Task, run

TOOLS = ("perf", "callgrind")


def available(tool: str) -> str | None:
    """The reason why a tool cannot count here, or None."""
    if tool == "callgrind":
        absent = [name for name in ("valgrind", "callgrind_control") if shutil.which(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else None
    if shutil.which("perf") is None:
        return "perf is not installed"
    probe = ["perf", "stat", "-x,", "-e", "instructions:u", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0 or parse_perf(done.stderr) is None:
        return "this machine shows perf no instruction counter"
    return None


def count(task: Task) -> dict[str, Any]:
    """{"per_image", "tool", "images"}, or {"reason"} where no tool can count. One CPU thread, whatever
    `task` says: how threads wait for one another would count too."""
    reasons = {tool: available(tool) for tool in TOOLS}
    tool = next((t for t, reason in reasons.items() if reason is None), None)
    if tool is None:
        return {"reason": "; ".join(f"{t}: {reason}" for t, reason in reasons.items())}
    task = replace(task, kind="instructions", threads=1, images=20 if tool == "perf" else 1)
    total = (_perf if tool == "perf" else _callgrind)(task)
    return {"per_image": total / task.images, "tool": tool, "images": task.images}


def _perf(task: Task, event: str = "instructions:u") -> float:
    with TemporaryDirectory() as folder:
        control, ack, out = (os.path.join(folder, name) for name in ("control", "ack", "out"))
        os.mkfifo(control)
        os.mkfifo(ack)
        wrapper = ("perf", "stat", "-x,", "-e", event, "-o", out, "--delay=-1", f"--control=fifo:{control},{ack}")
        run(replace(task, control={"perf": control, "ack": ack}), wrapper)
        counted = parse_perf(Path(out).read_text())
    if counted is None:
        raise TwinFlowError("perf counted nothing though it could before; run the bench again")
    return counted


def _callgrind(task: Task) -> float:
    with TemporaryDirectory() as folder:
        out = os.path.join(folder, "out")
        wrapper = ("valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}")
        run(replace(task, control={"callgrind": shutil.which("callgrind_control") or ""}), wrapper)
        return parse_callgrind("".join(p.read_text() for p in sorted(Path(folder).glob("out*"))))


def parse_perf(text: str) -> float | None:
    """The count in `perf stat -x,`'s output; None for "<not supported>" and the like."""
    for line in text.splitlines():
        first = line.split(",")[0]
        if line.count(",") > 2 and re.fullmatch(r"[0-9.]+", first):
            return float(first)
    return None


def parse_callgrind(text: str) -> float:
    """Instructions in callgrind's files: the sum of their totals."""
    return float(sum(int(n) for n in re.findall(r"^totals: (\d+)", text, re.MULTILINE)))
