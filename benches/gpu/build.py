"""Makes the checkout importable without installing it: BUILD/python/twinflow_rt links to its files, with the
native libraries compiled for this machine beside them. Needs nvcc for the GPU library and c++ with pybind11's
headers (torch carries them) for the CPU extension; what cannot be built is said and left out.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA_HOME = Path("/usr/local/cuda/bin/nvcc")


def link(folder: Path) -> Path:
    """Make fresh links to the package's files and return the linked package; libraries built earlier stay."""
    package = folder / "python" / "twinflow_rt"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():
        if old.is_symlink():
            old.unlink()
    for item in (ROOT / "twinflow_rt").iterdir():
        if item.suffix != ".so" and item.name not in ("__pycache__", "kernels"):
            (package / item.name).symlink_to(item)
    (package / "kernels").symlink_to(ROOT / "kernels")
    return package


def stale(target: Path, sources: Sequence[Path]) -> bool:
    return not target.exists() or any(s.stat().st_mtime > target.stat().st_mtime for s in sources)


def gpu_library(package: Path) -> str:
    nvcc = shutil.which("nvcc") or (str(CUDA_HOME) if CUDA_HOME.exists() else None)
    if nvcc is None:
        return "left out: no nvcc on PATH or in /usr/local/cuda"
    target, sources = package / "libtwinflow_cuda.so", sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    watched = [*sources, *(ROOT / "csrc" / "cuda").glob("*.cuh"), *(ROOT / "csrc" / "include").glob("*.h")]
    if not stale(target, watched):
        return "up to date"
    command = [
        nvcc, "-shared", "-std=c++17", "-O3", "-arch=native", "--cudart=static", "--threads=0",
        "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc/include'}", *map(str, sources), "-o", str(target),
    ]  # fmt: skip
    return _compile(command)


def cpu_extension(package: Path) -> str:
    headers = _pybind11()
    if shutil.which("c++") is None or headers is None:
        return "left out: needs c++ and pybind11's headers"
    target = package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    csrc = ROOT / "csrc"
    sources = [csrc / "bindings.cpp", csrc / "cpu" / "kernels.cpp", csrc / "cpu" / "dispatch.cpp"]
    if not stale(target, [*sources, *csrc.rglob("*.h")]):
        return "up to date"
    command = [
        "c++", "-shared", "-fPIC", "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fvisibility=hidden",
        "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-DTWINFLOW_ISA=twinflow_kernels_baseline",
        f"-I{csrc / 'include'}", f"-I{csrc / 'cpu'}", f"-I{headers}", f"-I{sysconfig.get_paths()['include']}",
        *map(str, sources), "-o", str(target),
    ]  # fmt: skip
    return _compile(command)


def _pybind11() -> Path | None:
    for name, below in (("pybind11", "include"), ("torch", "include")):
        spec = find_spec(name)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / below / "pybind11" / "pybind11.h").exists():
                return Path(place) / below
    return None


def _compile(command: list[str]) -> str:
    print("+", *command, flush=True)
    done = subprocess.run(command, check=False)
    return "built" if done.returncode == 0 else f"failed: exit status {done.returncode}"


def main(argv: Sequence[str] | None = None) -> int:
    """Fails where a compiler was found and did not succeed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=Path)
    parser.add_argument("--dry", action="store_true", help="link the libraries of the checkout instead of compiling")
    args = parser.parse_args(argv)
    package = link(args.build)
    if args.dry:
        for library in (ROOT / "twinflow_rt").glob("*.so"):
            (package / library.name).unlink(missing_ok=True)
            (package / library.name).symlink_to(library)
        return 0
    results = {"GPU library": gpu_library(package), "CPU extension": cpu_extension(package)}
    for name, result in results.items():
        print(f"{name}: {result}")
    return int(any(result.startswith("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
