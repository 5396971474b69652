"""What 4-bit weights cost in time on a CPU: a whole call of the medium Z-Image, and its layers one by one.

    OMP_NUM_THREADS=1 python -m benches.int4_speed --json benches/records/int4-cpu.json [--repeats 5]

Whole calls at 384 x 384 (576 image tokens) in fp32, int8 and int4, random weights of the size in `benches/peers`.
Seconds are of the CPU, not of the clock: other work on the machine changes them less. Of each, the least of the
repeats, which take turns. bytes: of the network's tensors. Writes "speed" of FILE, whose other entries stay.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benches.peers.cases import CASES
from twinflow_rt import load
from twinflow_rt.bench.facts import machine
from twinflow_rt.checkpoint.atomic import write_json
from twinflow_rt.checkpoint.files import read_json
from twinflow_rt.ops.int4 import Int4Weight, quantize_int4
from twinflow_rt.ops.linear import linear_packed, pack, quantize_rows
from twinflow_rt.ops.native import int4, linear

PRECISIONS = ("fp32", "int8", "int4")
PROMPT = "a photograph of a lighthouse in a storm at dusk"
# rows, inputs, outputs
SHAPES = ((32, 768, 2304), (576, 768, 2304), (576, 768, 768), (576, 768, 4096), (576, 2048, 768))


def least(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the least CPU seconds of each call, which take turns; the first of each is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            before = time.process_time()
            call()
            taken[name].append(time.process_time() - before)
    return {name: min(some[1:]) for name, some in taken.items()}


def whole_calls(repeats: int) -> dict[str, Any]:
    """Return seconds of a call and bytes of the network, by precision."""
    case = CASES["medium"]
    with case.folder() as folder:
        pipes = {p: load(str(folder), device="cpu", precision=p) for p in PRECISIONS}
    sizes = {"width": case.size, "height": case.size}
    seconds = least({p: lambda pipe=pipe: pipe(PROMPT, seed=7, **sizes) for p, pipe in pipes.items()}, repeats)
    nbytes = {p: sum(t.nbytes for t in pipe.program.network.state_dict().values()) for p, pipe in pipes.items()}
    return {"pixels": case.size, "seconds": seconds, "bytes": nbytes, "int4_to_int8": seconds["int4"] / seconds["int8"]}


def layer(rows: int, inputs: int, outputs: int, repeats: int) -> dict[str, Any]:
    """Return milliseconds of one layer in each form."""
    x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs) * inputs**-0.5
    values, packed, eight = quantize_rows(x, torch.int8), pack(w), quantize_rows(w, torch.int8)
    four: Int4Weight = quantize_int4(w, 64)
    seconds = least({
        "fp32": lambda: linear_packed(x, packed, None),
        "int8": lambda: linear.linear_quantized(*values, *eight, None, x.dtype),
        "int4 (W4A8)": lambda: int4.linear_w4a8(*values, *four, None, x.dtype),
        "int4 (W4A16)": lambda: int4.linear_w4a16(x, *four, None),
    }, repeats)  # fmt: skip
    return {"rows": rows, "inputs": inputs, "outputs": outputs, "ms": {k: 1e3 * v for k, v in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with torch.inference_mode():
        layers = [layer(*shape, 4 * args.repeats) for shape in SHAPES]
    speed = {"machine": machine(), "layers": layers, **whole_calls(args.repeats)}
    for entry in layers:
        print(*(f"{name} {ms:.2f} ms" for name, ms in entry["ms"].items()), sep=", ")
    for name in PRECISIONS:
        print(f"{name}: {speed['seconds'][name]:.2f} s, {speed['bytes'][name] / 1e6:.0f} MB")
    print(f"int4 takes {speed['int4_to_int8']:.3f} times the time of int8")
    if args.json is not None:
        write_json(args.json, {"schema": 1} | (read_json(args.json) if args.json.exists() else {}) | {"speed": speed})


if __name__ == "__main__":
    main()
