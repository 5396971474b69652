"""The C interface as others see it: the header in C99 and C++17, the symbols of the built libraries, one version."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from twinflow_rt.ops.native import library

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "csrc" / "include" / "twinflow_rt.h"
COMPILERS = {"c99": ("cc", "c"), "c++17": ("c++", "c++")}
USE = """
#include "twinflow_rt.h"
#include "twinflow_rt.h"
int main(void) { return twinflow_abi_version() != TWINFLOW_ABI_VERSION || twinflow_error_message(TWINFLOW_OK) == 0; }
"""


def declared() -> set[str]:
    """Names of the functions that the header declares."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    return set(re.findall(r"\b(twinflow_\w+)\s*\(", text))


def of(library_name: str) -> set[str]:
    cuda = {name for name in declared() if name.startswith("twinflow_cuda_")}
    return cuda if library_name == "cuda" else declared() - cuda


def kernels(macro: str) -> set[str]:
    """Names in the table of kernels: KERNEL, of both libraries, or KERNEL_CPU, of the CPU's alone."""
    return set(re.findall(rf"^{macro}\((\w+),", HEADER.with_name("twinflow_kernels.h").read_text(), re.MULTILINE))


def version() -> int:
    return int(re.search(r"#define TWINFLOW_ABI_VERSION (\d+)", HEADER.read_text()).group(1))


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def exported(path: Path) -> set[str]:
    """C names that a shared library defines for others; the C++ library's type descriptions are no interface."""
    if not shutil.which("nm"):
        pytest.skip("needs nm (binutils)")
    lines = run("nm", "--dynamic", "--defined-only", path).splitlines()
    return {name for line in lines if not (name := line.split()[-1].partition("@")[0]).startswith("_Z")}


@pytest.mark.parametrize("standard", COMPILERS)
def test_header_compiles_strictly(standard, tmp_path):
    compiler, language = COMPILERS[standard]
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    source = tmp_path / "use.txt"
    source.write_text(USE)
    strict = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-pedantic-errors", "-Wstrict-prototypes"]
    strict = strict if language == "c" else strict[:-1]
    include = f"-I{HEADER.parent}"
    run(compiler, "-x", language, f"-std={standard}", *strict, include, "-c", source, "-o", tmp_path / "use.o")


def test_header_has_both_libraries():
    assert {"twinflow_abi_version", "twinflow_cpu_kernels"} <= of("cpu")
    assert {"twinflow_cuda_abi_version", "twinflow_cuda_kernels"} <= of("cuda")
    assert "rms_norm" in kernels("KERNEL") and "winograd_input" in kernels("KERNEL_CPU")


def test_each_library_has_its_kernels(emulated):
    every = kernels("KERNEL") | kernels("KERNEL_CPU")
    assert {name for name in every if hasattr(library.load("cpu"), name)} == every
    assert {name for name in every if hasattr(emulated, name)} == kernels("KERNEL")


def test_calls_with_wrong_arguments_are_refused():
    """By the bindings, before anything runs."""
    run = library.load("cpu").x0_project
    for arguments in ((), (1, 2, 3), (0, 0, 0, 0, 1.0, (0, 1)), (0, 0, 0, 0, 1.0, 0), ("x", 0, 0, 0, 1.0, (0, 1, 0))):
        with pytest.raises(TypeError):
            run(*arguments)
    with pytest.raises(OverflowError):
        run(0, 0, 0, 2**63, 1.0, (0, 1, 0))
    assert run(0, 0, 0, 0, 1.0, (0, 1, 0, "what follows the fields is not read")) is None


def test_gpu_library_exports_what_is_declared():
    """Built by nvcc where there is one: exactly the declared functions, nothing of the CUDA runtime inside it."""
    if not library.CUDA_LIBRARY.exists():
        assert not shutil.which("nvcc"), library.unavailable_reason("cuda")
        pytest.skip("built without nvcc")
    assert exported(library.CUDA_LIBRARY) == of("cuda")


def test_cpu_library_exports_what_is_declared():
    """The extension contains the CPU functions and needs nothing else to offer them."""
    assert exported(Path(library.load("cpu").__file__)) == of("cpu") | {"PyInit__native"}


def test_every_cpu_function_is_called_from_c():
    text = (ROOT / "tests" / "native" / "abi.c").read_text()
    assert of("cpu") <= set(re.findall(r"\b(twinflow_\w+)\(", text))
    assert kernels("KERNEL") | kernels("KERNEL_CPU") <= set(re.findall(r"\bRUN\((\w+),", text))


def test_one_version_everywhere():
    assert version() == library.ABI_VERSION
    assert library.load("cpu").abi_version == version()
    gpu = library.load("cuda")
    if not isinstance(gpu, str):
        assert gpu.abi_version == version()
