"""Runs the package at the lowest and at the newest versions that pyproject.toml allows, each in an environment
of its own.

    make check-bounds                      # or: python tests/check_bounds.py [runtime] [lowest] [newest]

runtime: only what `dependencies` name, at their lower bounds. lowest: with the optional parts, all at their
lower bounds; newest: all at their newest. pyproject.toml names no CPU builds, so on Linux PyPI's torch comes
with CUDA's libraries, about 2.5 GB a version; UV_FIND_LINKS or UV_TORCH_BACKEND=cpu say otherwise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()
EXTRAS = ("train", "eval", "report", "serve", "gpu", "gguf")
TOOLS = ("pytest>=8", "pytest-benchmark>=5", "hypothesis>=6.100", "httpx>=0.27")
SHOWN = (
    "torch", "triton", "numpy", "safetensors", "tokenizers", "jinja2", "pillow", "rich", "transformers", "diffusers",
)  # fmt: skip

# with nothing but the runtime's own dependencies
RUNTIME = (
    "tests/sampling/test_sampler.py", "tests/sampling/test_sampler_rules.py", "tests/sampling/test_schedule.py",
    "tests/sampling/test_noise.py", "tests/packaging/test_schemas.py", "tests/ops/test_reference.py",
    "tests/ops/test_select.py", "tests/ops/test_linear.py",
)  # fmt: skip
# with them: networks and text encoders against theirs, scipy, Triton's kernels in its interpreter
OPTIONAL = (
    "tests/models/test_transformers.py", "tests/stages/test_text.py", "tests/stages/test_vae.py",
    "tests/checkpoint/test_artifact.py", "tests/checkpoint/test_gguf_file.py", "tests/evaluate/test_check.py",
    "tests/kernels/test_norm.py",
)  # fmt: skip

# a model loads, makes the same image in every way of keeping it, and as int8
USE = """
import sys, torch, twinflow_rt
image = lambda path, **options: twinflow_rt.load(path, **options)("a green triangle", seed=0, output="pt").images
first = image("demo")
twinflow_rt.load("demo").save(sys.argv[1])
assert torch.equal(image(sys.argv[1]), first)
assert (image("demo", precision="int8") - first).abs().mean() < 0.05
"""

WAYS = {
    "runtime": ("lowest-direct", (), RUNTIME), "lowest": ("lowest-direct", EXTRAS, OPTIONAL),
    "newest": ("highest", EXTRAS, (*RUNTIME, *OPTIONAL)),
}  # fmt: skip


def must(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout[-6000:]}")
    return done.stdout


def versions(python: Path) -> str:
    listed = dict(line.split("==") for line in must("uv", "pip", "freeze", "--python", python).split() if "==" in line)
    return ", ".join(f"{name} {listed[name]}" for name in SHOWN if name in listed)


def check(way: str, wheel: Path, checkout: Path, folder: Path) -> None:
    """checkout: the tests without the package beside them, so that the installed one is what they import."""
    resolution, extras, tests = WAYS[way]
    must("uv", "venv", "--quiet", "--python", sys.executable, folder)
    python = folder / "bin" / "python"
    wanted = [word for extra in extras for word in ("--extra", extra)]
    install = ("uv", "pip", "install", "--python", python)
    must(*install, "--resolution", resolution, "-r", "pyproject.toml", *wanted, *TOOLS)
    must(*install, "--no-deps", wheel)
    print(f"    {way}: {versions(python)}", flush=True)
    must(folder / "bin" / "twinflow-rt", "generate", "a green triangle", "--seed", "0", "-o", folder / "out.png")
    must(python, "-c", USE, folder / "saved", cwd=checkout)
    tail = must(python, "-m", "pytest", "-q", "-x", *tests, cwd=checkout).strip().splitlines()[-1]
    print(f"ok  {way}: {tail}", flush=True)


def main(ways: list[str]) -> None:
    if unknown := set(ways) - set(WAYS):
        sys.exit(f"no way {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # uv
    with tempfile.TemporaryDirectory() as name:
        work = Path(name).resolve()
        must("uv", "build", "--quiet", "--wheel", "--out-dir", work / "dist", TWINFLOW_CUDA="OFF")
        (wheel,) = (work / "dist").glob("*.whl")
        for part in ("tests", "benches", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            (work / "checkout").mkdir(exist_ok=True)
            copy(ROOT / part, work / "checkout" / part)
        for way in ways or WAYS:
            check(way, wheel, work / "checkout", work / way)


if __name__ == "__main__":
    main(sys.argv[1:])
