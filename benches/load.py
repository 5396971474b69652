"""Sustained load on a server on loopback: every answer must be its own request's image, and memory stay flat.

    python -m benches.load demo --requests 2000 --concurrency 1 4 16 --json FILE [-- --max-batch 4]

starts `twinflow-rt serve` (what follows `--` are its options), sends each number of concurrent requests
in turn, after a warm-up at the largest, and exits with 1 if an answer was lost or wrong or the server's
resident memory grew by more than `--max-growth`. Both the requests and the seconds of a turn are bounded.

An answer is right if it equals, byte for byte, what the model makes of that prompt and seed alone. Beside
others in a batch sums may be formed in another order, so that a pixel falls on the next of 255 levels;
such answers are counted apart (`off_by_one`) and there are none with `-- --max-batch 1`.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import httpx
import numpy as np

ROUTE = "/v1/images/generations"
START = 300  # seconds a server may take to load
REQUEST = 300  # seconds one answer may take
SUBJECTS = ("a red circle", "a blue square above a green cross", "two yellow triangles", "")


@dataclass(frozen=True)
class Case:
    """A request, and the image it must be answered with, uint8 [H, W, 3]."""

    body: dict[str, Any]
    image: np.ndarray


@dataclass
class Turn:
    """What came of one turn. Seconds per answer are those a client waited; `seconds` is the whole turn."""

    concurrency: int
    sent: int = 0
    exact: int = 0
    off_by_one: int = 0
    wrong: int = 0
    failed: int = 0
    seconds: float = 0.0
    latency: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether every request was answered with its own image."""
        return self.sent > 0 and self.sent == self.exact + self.off_by_one


def cases(pipe: Any, sizes: Sequence[tuple[int, int]]) -> list[Case]:
    """Requests that differ in prompt, seed and size (width, height), with the images `pipe` makes of each alone."""
    made = []
    for number, subject in enumerate(SUBJECTS):
        for width, height in sizes:
            seed = 1000 * number + width
            body = {"prompt": subject, "seed": seed, "size": f"{width}x{height}"}
            made.append(Case(body, pipe(subject, seed=seed, width=width, height=height, output="np").images[0]))
    for i, one in enumerate(made):
        for other in made[:i]:
            if one.image.shape == other.image.shape and _distance(one.image, other.image) < 8:
                raise RuntimeError(f"{one.body} and {other.body} look alike: a mix-up would not show with this model")
    return made


def run_turn(url: str, cases: Sequence[Case], concurrency: int, requests: int, seconds: float) -> Turn:
    """Sends `requests` requests, `concurrency` at a time; none is begun after `seconds`."""
    turn, lock, waited = Turn(concurrency), threading.Lock(), []
    numbers, began = iter(range(requests)), time.monotonic()

    def caller() -> None:
        while time.monotonic() - began < seconds:
            with lock:
                number = next(numbers, None)
                if number is None:
                    return
                turn.sent += 1
            case, start = cases[number % len(cases)], time.monotonic()
            verdict, problem = _ask(client, case)
            with lock:
                waited.append(time.monotonic() - start)
                setattr(turn, verdict, getattr(turn, verdict) + 1)
                if problem and len(turn.problems) < 10:
                    turn.problems.append(problem)

    bounds = httpx.Limits(max_connections=concurrency)
    with httpx.Client(base_url=url, timeout=REQUEST, limits=bounds) as client, ThreadPoolExecutor(concurrency) as pool:
        for future in [pool.submit(caller) for _ in range(concurrency)]:
            future.result()
    turn.seconds = time.monotonic() - began
    turn.latency = {f"p{q}": float(np.percentile(waited, q)) for q in (50, 95, 100)} if waited else {}
    return turn


def _ask(client: httpx.Client, case: Case) -> tuple[str, str]:
    """One request: which of `Turn`'s counters it belongs to, and what was wrong with it."""
    try:
        answer = client.post(ROUTE, json=case.body)
    except httpx.HTTPError as error:
        return "failed", f"{case.body}: {error!r}"
    if answer.status_code != 200:
        return "failed", f"{case.body}: {answer.status_code} {answer.text[:200]}"
    entries = answer.json()["data"]
    if len(entries) != 1 or entries[0]["seed"] != case.body["seed"]:
        return "wrong", f"{case.body}: answered with {len(entries)} images, seeds {[e['seed'] for e in entries]}"
    image = read_image(entries[0]["b64_json"])
    distance = _distance(image, case.image) if image.shape == case.image.shape else 255
    if distance > 1:
        return "wrong", f"{case.body}: image {image.shape} is {distance} levels from its own"
    return ("off_by_one" if distance else "exact"), ""


def read_image(encoded: str) -> np.ndarray:
    """The pixels of a base64 PNG."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def _distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


def resident(url: str) -> int:
    """Resident bytes of the server's process, as its /metrics says."""
    text = httpx.get(f"{url}/metrics", timeout=REQUEST).text
    found = re.search(r"^process_resident_memory_bytes (.+)$", text, re.M)
    if found is None:
        raise RuntimeError("the server does not tell its memory; this needs Linux")
    return int(float(found[1]))


@contextmanager
def served(model: str, *options: str) -> Iterator[str]:
    """A `twinflow-rt serve` process; yields its address, and ends with it drained."""
    command = [sys.executable, "-m", "twinflow_rt.cli", "serve", model, "--port", "0", *options]
    with NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield _address(process, Path(log.name))
            process.terminate()
            if process.wait(60):
                raise RuntimeError(f"the server did not drain: {Path(log.name).read_text()[-1000:]}")
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START
    while time.monotonic() < end:
        found = re.search(r"serving \S+ on (http://\S+)", log.read_text())
        if found is not None:
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start: {log.read_text()[-1000:]}")


def measure(
    url: str, made: Sequence[Case], concurrencies: Sequence[int], requests: int, seconds: float
) -> tuple[list[Turn], dict[str, int]]:
    """A warm-up turn at the largest concurrency, then each concurrency; and the server's resident bytes
    after the warm-up and after each turn."""
    turns, memory = [], {}
    for name, concurrency in [("warm-up", max(concurrencies)), *((str(c), c) for c in concurrencies)]:
        turns.append(run_turn(url, made, concurrency, requests, seconds))
        memory[name] = resident(url)
    return turns, memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; returns 0, or 1 where something was lost or wrong or memory grew."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = _parser().parse_args(words[:cut])
    from twinflow_rt import load
    from twinflow_rt.bench import facts

    made = cases(load(args.model, device=args.device), args.sizes)
    device = ["--device", args.device] if args.device else []
    with served(args.model, *device, *words[cut + 1 :]) as url:
        turns, memory = measure(url, made, args.concurrency, args.requests, args.seconds)
    growth = max(memory.values()) - memory["warm-up"]
    report = {
        "command": f"python -m benches.load {' '.join(words)}",
        "machine": facts.machine(),
        "turns": [asdict(turn) for turn in turns],
        "resident_bytes": memory,
        "growth_bytes": growth,
        "max_growth_bytes": int(args.max_growth * 1e6),
    }
    report["passed"] = all(turn.clean for turn in turns) and growth <= report["max_growth_bytes"]
    text = json.dumps(report, indent=1)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)
    return 0 if report["passed"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches.load", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="demo", help="model folder, or 'demo' (default)")
    parser.add_argument("--requests", type=int, default=1000, help="of each turn (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="of a turn, at most (default %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="turns (default 1 4 16)")
    parser.add_argument(
        "--sizes", type=_size, nargs="+", default=[(64, 64), (48, 64)], metavar="WxH", help="default: 64x64 48x64"
    )
    parser.add_argument("--max-growth", type=float, default=32, metavar="MB", help="of memory (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    return parser


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


if __name__ == "__main__":
    sys.exit(main())
