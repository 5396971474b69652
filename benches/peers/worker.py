"""One peer in a process of its own: answers lines on stdin with lines of JSON on stdout.

    first                  builds the peer and makes the first output; {"seconds": since the process began}
    time FIGURE N          {"seconds": of one call}
    output FIGURE FILE     saves the output of call 0, float32, clamped to [-1, 1]
    peak                   {"bytes": peak resident memory}
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


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

            calls = build(task["peer"], task["part"], Path(task["folder"]), task["size"])
            calls["total"](0)
            answer = {"seconds": time.monotonic() - task["origin"], "figures": list(calls)}
        elif word == "time":
            begin = time.perf_counter()
            calls[arguments[0]](int(arguments[1]))
            answer = {"seconds": time.perf_counter() - begin}
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
