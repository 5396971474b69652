"""One peer in a process of its own: answers lines on stdin with lines of JSON on stdout.

    first                  builds the peer and makes the first output; {"seconds": since the process began}
    turn FIGURE N          {"after_pause": of call 2N, "seconds": of call 2N + 1}; or, where call 2N takes more than
                           0.25 s, {"seconds": of call 2N}
    output FIGURE FILE     saves the output of call 0, float32, clamped to [-1, 1]
    peak                   {"bytes": peak resident memory}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ONCE = 0.25  # seconds; to longer calls a pause before them does not matter


def turn(call: Callable[[int], Any], n: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Times calls 2n and 2n + 1, or 2n alone where it is a long one."""
    begin = clock()
    call(2 * n)
    first = clock() - begin
    if first > ONCE:
        return {"seconds": first}
    begin = clock()
    call(2 * n + 1)
    return {"seconds": clock() - begin, "after_pause": first}


def serve(task: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    calls: dict[str, Any] = {}
    for line in sys.stdin:
        word, *arguments = line.split()
        answer: dict[str, Any] = {}
        if word == "first":
            import torch

            torch.set_num_threads(task["threads"])
            from .contenders import build

            calls = build(task["peer"], task["part"], Path(task["folder"]), task["size"], task["steps"])
            calls["total"](0)
            answer = {"seconds": time.monotonic() - task["origin"], "figures": list(calls)}
        elif word == "turn":
            answer = turn(calls[arguments[0]], int(arguments[1]))
        elif word == "output":
            # some decoders clamp, others leave it to the step that follows
            pixels = calls[arguments[0]](0).float().clamp(-1, 1)
            torch.save(pixels.contiguous().clone(), arguments[1])
        elif word == "peak":
            from twinflow_rt.host_memory import peak_bytes

            answer = {"bytes": peak_bytes()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
