"""What the compilers say of the native code: the C interface is C99, no access leaves its arrays, no GPU
kernel spills registers, and a launch that cannot work is refused with the reason."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from twinflow_rt.ops.native import library

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("c++")), reason="needs cc and c++")
def test_c_interface_under_the_sanitizers(tmp_path):
    out = run("sh", str(ROOT / "tests" / "native" / "sanitize.sh"), "address", str(tmp_path), LD_PRELOAD="")
    assert "C interface: ok" in out


CHIPS = ("80", "86", "89", "90a", "100", "120")
ARCHS = [pytest.param(sm, marks=() if sm == "90a" else pytest.mark.full) for sm in CHIPS]
# stem -> kernel -> how many instantiations, most registers of one: 128 lets 512 threads live on a multiprocessor
KERNELS = {
    "norm": {"norm": (32, 128), "residual": (32, 128)}, "rope": {"qk_norm_rope": (4, 64)},
    "mlp": {"activation": (8, 40), "activation_quantized": (16, 128)},
    "linear": {"quantize": (8, 64), "dequantize": (4, 40)}, "sample": {"x0_project": (4, 32)},
    "decode": {"bytes": (2, 40), "pixels": (2, 40)}, "library": {"probe": (1, 16)},
}  # fmt: skip


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("sm", ARCHS)
@pytest.mark.parametrize("stem", KERNELS)
def test_gpu_kernels_live_in_registers(stem, sm, tmp_path):
    source, include = ROOT / "csrc" / "cuda" / f"{stem}.cu", ROOT / "csrc" / "include"
    report = run(
        NVCC, "-std=c++17", "-O3", f"-arch=sm_{sm}", "-cubin", "-Xptxas", "-v", "-Xcompiler=-Wall,-Wextra,-Werror",
        f"-I{include}", str(source), "-o", str(tmp_path / "out.cubin"),
    )  # fmt: skip
    local = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill|lmem)", report)]
    assert local and max(local) == 0
    used = {}
    for symbol, registers in re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", report, re.DOTALL):
        used.setdefault(kernel_of(symbol), []).append(int(registers))
    assert used.keys() == KERNELS[stem].keys()
    for name, (count, most) in KERNELS[stem].items():
        assert len(used[name]) == count and max(used[name]) <= most, (name, used[name])


def kernel_of(symbol: str) -> str:
    """The name of a kernel in namespace twinflow::(anonymous), from its mangled one: each part after its length."""
    at, name = symbol.index("_ZN") + 3, ""
    while match := re.match(r"(\d+)", symbol[at:]):
        start = at + len(match[1])
        at = start + int(match[1])
        name = symbol[start:at]
    return name


def test_every_gpu_source_is_built_and_checked():
    stems = {p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu")}
    text = (ROOT / "CMakeLists.txt").read_text()
    assert stems == set(KERNELS) == set(re.search(r"set\(stems ([a-z ]+)\)", text)[1].split())
    assert tuple(re.search(r"foreach\(sm ([0-9a ]+)\)", text)[1].split()) == CHIPS


def test_gpu_library_has_code_for_every_chip():
    """What the newest nvcc builds: machine code for each, and PTX of the newest, which later chips compile."""
    cuda_kernels()
    triton = find_spec("triton")
    cuobjdump = f"{Path(triton.origin).parent}/backends/nvidia/bin/cuobjdump" if triton else shutil.which("cuobjdump")
    if not cuobjdump:
        pytest.skip("needs cuobjdump, which CUDA and Triton have")
    code, ptx = (run(cuobjdump, kind, str(library.CUDA_LIBRARY)) for kind in ("--list-elf", "--list-ptx"))
    found = set(re.findall(r"\.sm_(\w+)\.", code))
    assert found and found <= set(CHIPS)
    assert set(re.findall(r"\.sm_(\w+)\.", ptx)) == {max(found, key=number)}
    if NVCC:  # which built it
        known = run(NVCC, "--list-gpu-code")
        assert found == {sm for sm in CHIPS if f"sm_{number(sm)}" in known.split()}


def number(sm: str) -> int:
    return int(sm.rstrip("a"))


def cuda_kernels() -> library.CudaKernels:
    if reason := library.unavailable_reason("cuda"):
        if NVCC:
            pytest.fail(reason)  # the build finds the same nvcc
        pytest.skip(reason)
    return library.load("cuda")


def test_gpu_library_names_its_errors():
    kernels = cuda_kernels()
    assert kernels.abi_version == library.ABI_VERSION
    shape, far, row, w, none = (1, 1, 8), 2**31, (16, 8, 8), (16, 0), (0, 0)
    out, int8, f32, bf16 = (16, 0, 0), (16, 16, 1), (0, 0, 0), (1, 0, 0)
    with pytest.raises(RuntimeError, match="pointer is NULL"):
        kernels.rms_norm((0, 8, 8), none, (0, 0, 0), shape, 1e-5, f32)
    with pytest.raises(RuntimeError, match="none of twinflow_dtype"):
        kernels.rms_norm(row, w, out, shape, 1e-5, (5, 0, 0))
    for wrong in (
        lambda: kernels.quantize_rows(row, (16, 16, 3), shape, f32),
        lambda: kernels.quantize_rows(row, out, shape, f32),
        lambda: kernels.residual_norm(row, row, w, w, 16, (16, 16, -1), shape, 1e-5, f32),
        lambda: kernels.swiglu(16, (16, 16, 7), 1, 8, f32),
    ):
        with pytest.raises(RuntimeError, match="none of twinflow_format"):
            wrong()
    for without_scales in (
        lambda: kernels.rms_norm(row, w, (16, 0, 1), shape, 1e-5, f32),
        lambda: kernels.gelu_tanh(16, (16, 0, 1), 1, 8, f32),
        lambda: kernels.dequantize(16, 16, 0, 0, 16, 1, 8, f32),
    ):
        with pytest.raises(RuntimeError, match="pointer is NULL"):
            without_scales()
    token, angles = (16, 0, 0), (16, 16, 0, 4)
    for too_wide in (
        lambda: kernels.rms_norm(row, w, out, (1, 1, 2**20), 1e-5, f32),
        lambda: kernels.qk_norm_rope(token, 512, token, 512, 16, 16, (16, 16, 0, 256), (1, 1, 512), 1, 2, 1e-5, f32),
    ):
        with pytest.raises(RuntimeError, match="too wide"):
            too_wide()
    # more blocks than a grid has; nothing is launched, and no product overflows on the way to the answer
    for out_of_range in (
        lambda: kernels.rms_norm(row, w, out, (far, far, 8), 1e-5, f32),
        lambda: kernels.layer_norm(row, none, none, out, (2, far // 2, 8), 1e-5, bf16),
        lambda: kernels.qk_norm_rope(token, 8, token, 8, 16, 16, angles, (far, 1, 8), 1, 2, 1e-5, f32),
        lambda: kernels.qk_norm_rope(token, 8, token, 8, 16, 16, angles, (1, 1, 7), 1, 2, 1e-5, f32),
        lambda: kernels.swiglu(16, out, far, 8, f32),
        lambda: kernels.gelu_tanh(16, out, 1, far, f32),
        lambda: kernels.layer_norm(row, none, none, int8, (far, far, 8), 1e-5, bf16),
        lambda: kernels.quantize_rows(row, int8, (2, far // 2, 8), f32),
        lambda: kernels.swiglu(16, int8, far, 8, f32),
        lambda: kernels.dequantize(16, 16, 16, 0, 16, far, 8, f32),
        lambda: kernels.x0_project(16, 16, 16, 2**43, 1.0, bf16),
        lambda: kernels.to_uint8(16, (1, 1, 1, 1), 16, (2**20, 3, 2**16, 2**16), f32),
    ):
        with pytest.raises(RuntimeError, match="out of range"):
            out_of_range()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"CUDA driver|CUDA-capable"):
            kernels.rms_norm(row, w, out, shape, 1e-5, f32)
        assert re.search("CUDA driver|CUDA-capable", kernels.problem())
        assert library.unusable_reason() == "torch finds no CUDA device"


def test_absent_gpu_library_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "CUDA_LIBRARY", tmp_path / "absent.so")
    try:
        library.load.cache_clear()
        assert "TWINFLOW_CUDA=ON" in library.unavailable_reason("cuda")
        (tmp_path / "absent.so").write_bytes(b"not a library")
        library.load.cache_clear()
        assert "do not load" in library.unavailable_reason("cuda")
        assert "not on mps" in library.unavailable_reason("mps")
    finally:
        library.load.cache_clear()


def test_a_driver_that_refuses_is_a_reason(monkeypatch):
    """A driver older than the CUDA runtime inside the library, or a GPU it has no code for."""
    cuda_kernels()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(library.CudaKernels, "problem", lambda self: "no kernel image is available")
    assert library.unusable_reason() == "the driver refuses the GPU kernels: no kernel image is available"
