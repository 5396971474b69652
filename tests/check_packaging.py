"""Installs the package every way a user may, each into an environment of its own, and uses it there.

    make check-packaging

Works on a copy of the tracked files, so nothing left in the checkout can help. The new environments
see the dependencies of the one that runs this, not its copy of the package. Takes minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()
NVCC = bool(shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists())

CHECK = """
import sys, pathlib, subprocess
import twinflow_rt, twinflow_rt.kernels as kernels
place, gpu = pathlib.Path(sys.argv[1]), sys.argv[2] == "gpu"
assert pathlib.Path(twinflow_rt.__file__).is_relative_to(place), twinflow_rt.__file__
assert pathlib.Path(kernels.__file__).is_relative_to(place), kernels.__file__
assert not {"torch", "transformers", "triton"} & set(sys.modules)
import torch
from twinflow_rt import ops
from twinflow_rt.ops.native import library
from twinflow_rt.ops.implementations import IMPLEMENTATIONS
assert library.unavailable_reason() is None, library.unavailable_reason()
assert (library.unavailable_reason("cuda") is None) == gpu, library.unavailable_reason("cuda")
x, w = torch.randn(2, 37, 199), torch.randn(199)
torch.testing.assert_close(IMPLEMENTATIONS["rms_norm"]["native"].load()(x, w, 1e-5), ops.rms_norm(x, w, 1e-5))
assert (pathlib.Path(twinflow_rt.__file__).parent / "demo").exists() == (sys.argv[3] == "demo")
assert {"py.typed", "__init__.pyi"} < {file.name for file in pathlib.Path(twinflow_rt.__file__).parent.iterdir()}
script = pathlib.Path(sys.executable).with_name("twinflow-rt")
assert "generate" in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd="/", env=env, check=False)


def must(*command: object, **environment: str) -> str:
    done = run(*command, **environment)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def environment(folder: Path) -> Path:
    """A new virtual environment that sees the running one's dependencies; returns its python."""
    must(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    site = must(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def checkout(folder: Path) -> Path:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def verify(way: str, install: list[object], python: Path, place: Path, gpu: bool, **env: str) -> None:
    start = time.perf_counter()
    must(python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", *install, **env)
    seconds = time.perf_counter() - start
    demo = "demo" if any((ROOT / "twinflow_rt" / "demo").iterdir()) else "no demo"
    must(python, "-c", CHECK, place, "gpu" if gpu else "cpu", demo)
    print(f"ok  {way}: installed in {seconds:.0f} s", flush=True)


def wheel_of(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("twinflow_rt/kernels/__init__.py", "twinflow_rt/_native", "licenses/LICENSE"):
        assert any(wanted in name for name in names), f"{wanted} is not in {wheel.name}"
    assert not [n for n in names if n.startswith(("tests", "kernels", "csrc", "benches"))], names
    return wheel


def refusal(what: str, source: Path, python: Path, expected: str, **env: str) -> None:
    done = run(python, "-m", "pip", "install", "--no-deps", source, **env)
    assert done.returncode, f"{what}: was installed"
    assert expected in done.stdout + done.stderr, f"{what}: no {expected!r} in\n{done.stdout}{done.stderr}"
    print(f"ok  {what}: refused by name", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name).resolve()

        def source(way: str) -> Path:
            return checkout(work / way / "source")

        def fresh(way: str) -> tuple[Path, Path]:
            return environment(work / way / "env"), work / way / "env"

        python, place = fresh("plain")
        verify("pip install . without GPU kernels", [source("plain")], python, place, False, TWINFLOW_CUDA="OFF")

        python, _ = fresh("editable")
        tree = source("editable")
        verify("pip install -e .", ["--editable", tree], python, tree, NVCC)

        python, place = fresh("wheel")
        must(python, "-m", "pip", "install", "--quiet", "build")
        must(python, "-m", "build", "--outdir", work / "dist", source("wheel"))
        verify("python -m build: wheel from the sdist", [wheel_of(work / "dist")], python, place, NVCC)

        python, _ = fresh("refused")
        refusal("TWINFLOW_CUDA=maybe", source("refused"), python, "use AUTO, ON or OFF", TWINFLOW_CUDA="maybe")
        broken = work / "broken" / "nvcc"
        broken.parent.mkdir()
        broken.write_text("#!/bin/sh\necho 'nvcc is broken' >&2\nexit 1\n")
        broken.chmod(0o755)
        path = f"{broken.parent}{os.pathsep}{os.environ['PATH']}"
        refusal("an nvcc that fails", source("refused"), python, "TWINFLOW_CUDA=OFF builds without", PATH=path)


if __name__ == "__main__":
    main()
