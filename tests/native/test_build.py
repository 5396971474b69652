"""What the compilers say of the native code: the C interface is C99, no access leaves its arrays, and no
GPU kernel spills registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from twinflow_rt import native

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("c++")), reason="needs cc and c++")
def test_c_interface_under_the_sanitizers(tmp_path):
    out = run("sh", str(ROOT / "tests" / "native" / "sanitize.sh"), str(tmp_path), LD_PRELOAD="")
    assert "C interface: ok" in out


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("stem", ["norm", "decode"])
def test_gpu_kernels_do_not_spill(stem, tmp_path):
    source, include = ROOT / "csrc" / "cuda" / f"{stem}.cu", ROOT / "csrc" / "include"
    report = run(
        NVCC, "-std=c++17", "-O3", "-arch=sm_90", "-cubin", "-Xptxas", "-v", f"-I{include}", str(source), "-o",
        str(tmp_path / "out.cubin"),
    )  # fmt: skip
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert len(registers) == {"norm": 24, "decode": 4}[stem]  # one per instantiation
    assert spills and max(spills) == 0 and max(registers) <= 128


def cuda_kernels() -> native.CudaKernels:
    if reason := native.unavailable_reason("cuda"):
        if NVCC:
            pytest.fail(reason)  # the build finds the same nvcc
        pytest.skip(reason)
    return native._load("cuda")


def test_gpu_library_names_its_errors():
    kernels = cuda_kernels()
    assert kernels.abi_version == native.ABI_VERSION
    shape = (1, 1, 8, 1e-5)
    with pytest.raises(RuntimeError, match="pointer is NULL"):
        kernels.rms_norm(0, 8, 8, 0, 0, 0, *shape, 0, 0)
    with pytest.raises(RuntimeError, match="none of twinflow_dtype"):
        kernels.rms_norm(16, 8, 8, 16, 0, 16, *shape, 5, 0)
    with pytest.raises(RuntimeError, match="too wide"):
        kernels.rms_norm(16, 8, 8, 16, 0, 16, 1, 1, 2**20, 1e-5, 0, 0)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"CUDA driver|CUDA-capable"):
            kernels.rms_norm(16, 8, 8, 16, 0, 16, *shape, 0, 0)


def test_absent_gpu_library_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "CUDA_LIBRARY", tmp_path / "absent.so")
    native._load.cache_clear()
    assert "TWINFLOW_CUDA=ON" in native.unavailable_reason("cuda")
    (tmp_path / "absent.so").write_bytes(b"not a library")
    native._load.cache_clear()
    assert "do not load" in native.unavailable_reason("cuda")
    native._load.cache_clear()
    assert "not on mps" in native.unavailable_reason("mps")
