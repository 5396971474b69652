"""The parts of the GPU kit, each a process with a time limit; see ../gpu.sh. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"  # kept between calls; OUT may be empty every time
LIMIT_S = 470
ALONE = ("--batches", "", "--evaluations", "")  # no sweeps
TINY_MODEL = (
    "--scale", "0.05", "--layers", "1", "--size", "64", "--repeats", "2", "--warmup", "1", "--cold-runs", "0", *ALONE,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """`commands` run in turn; the first that fails fails the part. needs: a program without which it is skipped."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """status: ok, failed, timeout or skipped; reason: of all but ok."""

    part: str
    status: str
    seconds: float
    reason: str | None = None


def parts(out: Path, dry: bool) -> list[Part]:
    """What each part runs. `dry`: on the CPU, tiny."""
    python, device = (sys.executable, "-P", "-m"), ("--device", "cpu" if dry else "cuda")
    sizes = {"z-image": "z-image 1024x1024", "qwen-image": "qwen-image 1328x1328"}
    timed = {
        f"{part}-{model}": ("tiny" if dry else size, kind)
        for model, size in sizes.items()
        for part, kind in (("kernels", "ops"), ("layers", "layers"), ("rows", "rows"))
    }
    quick = ("--without", "compile", "--repeats", "3") if dry else ()

    def kernels(name: str, *arguments: str) -> tuple[str, ...]:
        return (*python, "benches.gpu.kernels", str(out / f"{name}.json"), *device, *arguments)

    def pytest(name: str, *arguments: str) -> tuple[str, ...]:
        plain = ("-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib")
        return (*python, "pytest", *plain, f"--junitxml={out}/{name}.xml", *arguments)

    def bench(model: str, record: str, *arguments: str, precision: tuple[str, ...] = ()) -> tuple[str, ...]:
        command = (*python, "twinflow_rt.cli", "bench", "--random-weights", model, "--json", f"{out}/{record}.json")
        full = ("--dtype", "bfloat16", "--cold-runs", "1", *arguments)
        return (*command, *device, *precision, *(TINY_MODEL if dry else full))

    fp8 = ("--precision", "fp8", "--tolerance", "0.15")  # of random weights; `sensitivity` says what trained ones lose
    int4 = ("--precision", "int4", "--tolerance", "0.3")
    large = ("--size", "1328")
    native = ("tests/native/test_native.py", "tests/native/test_rows.py")
    watched = pytest("sanitizer", "-m", "gpu", "-k", "(test_ops or test_rows) and odd and cuda", *native)
    compiled = "tests/ops/test_registered.py" if dry else "tests/gpu"
    marked = ("-m", "not gpu" if dry else "gpu", "-k")
    watch = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    return [
        Part("build", ((*python, "benches.gpu.build", str(BUILD), *(("--dry",) if dry else ())),)),
        Part("env", ((*python, "benches.gpu.env", f"{out}/env.json"),)),
        Part("checks", (kernels("checks", "--check-only", "--sizes", "tiny", *(() if dry else sizes.values())),)),
        Part("tests", (pytest("tests", *marked, "not emulated and not torch_compile", "tests/gpu", *native),)),
        Part("tests-compile", (pytest("tests-compile", *marked, "torch_compile", compiled),)),
        Part("sanitizer", tuple((*watch, tool, *watched) for tool in ("memcheck", "racecheck")), "compute-sanitizer"),
        *(
            Part(n, (kernels(n, "--dtypes", "bfloat16", "--sizes", size, "--kinds", kind, *quick),))
            for n, (size, kind) in timed.items()
        ),
        *(
            Part(model, (bench(model, model, "--size", "1024", "--peers", "eager,compile"),))
            for model in ("z-image", "sd3.5-m", "sana")
        ),
        Part(
            "qwen-image",  # the float32 reference of all 60 layers does not fit beside the network
            (
                bench("qwen-image", "qwen-image-shallow", *large, "--layers", "6", "--peers", "eager", *ALONE),
                bench("qwen-image", "qwen-image", *large, "--no-check", *ALONE),
            ),
        ),
        Part("z-image-fp8", (bench("z-image", "z-image-fp8", "--size", "1024", precision=fp8),)),
        Part("qwen-image-fp8", (bench("qwen-image", "qwen-image-fp8", *large, "--no-check", *ALONE, precision=fp8),)),
        Part("z-image-int4", (bench("z-image", "z-image-int4", "--size", "1024", precision=int4),)),
        Part(
            "qwen-image-int4",
            (bench("qwen-image", "qwen-image-int4", *large, "--no-check", *ALONE, precision=int4),),
        ),
        Part("report", ((*python, "benches.gpu.report", str(out)),)),
    ]


def run(part: Part, out: Path, limit_s: float = LIMIT_S) -> Outcome:
    """Runs a part, its output into OUT/PART.log; never raises for what the part does."""
    start = time.perf_counter()
    elapsed = lambda: round(time.perf_counter() - start, 1)
    if part.needs and shutil.which(part.needs) is None:
        return Outcome(part.name, "skipped", 0.0, f"{part.needs} is not on PATH")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(BUILD / "python"), str(ROOT)))}
    with open(out / f"{part.name}.log", "w") as log:
        for command in part.commands:
            print("+", *command, file=log, flush=True)
            # a session of its own, so that a time limit ends what the command started as well
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(max(limit_s - elapsed(), 0.1))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Outcome(part.name, "timeout", elapsed(), f"stopped after {limit_s:.0f} s; what it wrote is kept")
            if status:
                return Outcome(part.name, "failed", elapsed(), f"exit status {status}; see {part.name}.log")
    return Outcome(part.name, "ok", elapsed())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if no part failed (skipped is not failed), 1 otherwise."""
    parser = argparse.ArgumentParser(prog="benches/gpu.sh", description="Tests and measurements on a GPU machine.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for logs, JSON and the table")
    parser.add_argument("parts", nargs="*", metavar="part", help="default: all")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny: exercises the kit itself")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help="seconds a part may take")
    args = parser.parse_intermixed_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    known = {part.name: part for part in parts(args.out.resolve(), args.dry)}
    if unknown := set(args.parts) - set(known):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = [known[name] for name in known if name in (args.parts or known)]
    if not (BUILD / "python").exists() and known["build"] not in chosen:
        chosen.insert(0, known["build"])  # everything else imports what it leaves
    record = args.out / "kit.json"
    outcomes = json.loads(record.read_text()) if record.exists() else {}
    failed = False
    for part in chosen:
        outcome = run(part, args.out, args.limit)
        outcomes[part.name] = {**asdict(outcome), "dry": args.dry}
        record.write_text(json.dumps(outcomes, indent=1))
        failed |= outcome.status in ("failed", "timeout")
        print(f"{part.name:<12} {outcome.status:<8} {outcome.seconds:7.1f} s  {outcome.reason or ''}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
