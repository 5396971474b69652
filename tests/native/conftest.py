"""Where the native kernels run: the CPU, an emulator of CUDA on the CPU, and a GPU where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from twinflow_rt.ops.native import library

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """csrc/cuda built for the CPU. A misaligned 16-byte access ends the process, as it would end a kernel."""
    if not shutil.which("c++"):
        pytest.skip("needs c++")
    out = tmp_path_factory.mktemp("emulated") / "libtwinflow_cuda.so"
    command = [
        "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror",
        "-Wno-unknown-pragmas", "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error",
        f"-I{ROOT / 'tests/native/emulator'}", f"-I{ROOT / 'csrc/include'}", "-x", "c++",
        *map(str, sorted((ROOT / "csrc/cuda").glob("*.cu"))), "-o", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library.CudaKernels(out)


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def at(request, monkeypatch, nan_poison):
    """Moves tensors (nested in tuples) to where the kernels under test run."""
    import torch

    place = request.param
    if place == "emulated":
        kernels = request.getfixturevalue("emulated")
        monkeypatch.setattr(library, "load", lambda device: kernels)
    elif reason := library.unavailable_reason(place):
        pytest.fail(reason)  # `make test` builds it: absence is a defect, not a reason to skip

    def move(value):
        if isinstance(value, (tuple, list)):
            return type(value)(move(v) for v in value)
        return value.to("cuda" if place == "cuda" else "cpu") if isinstance(value, torch.Tensor) else value

    move.place = place
    return move
