"""The CPU kernels are plain C++ that the compiler vectorises, once per instruction set: that it does, and that nothing
of one machine has crept into the source."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
WIDEST = {"avx2": "ymm", "avx512": "zmm"}


def flags(isa: str) -> list[str]:
    """The compiler's flags for one instruction set, as CMakeLists.txt has them."""
    text = (ROOT / "CMakeLists.txt").read_text()
    common = re.search(r"set\(flags ([^)]*)\)", text)
    own = re.search(rf"kernels\({isa}([^)]*)\)", text)
    assert common and own
    return [*common.group(1).split(), *own.group(1).split()]


def test_the_source_names_no_machine():
    for path in CPU.iterdir():
        raw = r"\b(?:_mm\d*_\w+|__m\d+\w*|v\w+q_f32|__builtin_ia32_\w+|\w*intrin\.h|arm_neon\.h)\b"
        assert not (found := re.findall(raw, path.read_text())), (path.name, found)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86's instruction sets")
@pytest.mark.parametrize("isa", ["avx512", pytest.param("avx2", marks=pytest.mark.full)])
def test_loops_use_the_widest_registers(isa, tmp_path):
    """Float32 arithmetic on whole registers, the widest there are, outnumbers that on single numbers, of which the
    loops' remainders are made."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    assembly = tmp_path / "kernels.s"
    done = subprocess.run(
        ["g++", "-std=c++17", "-fPIC", "-fopenmp", *flags(isa), f"-I{ROOT / 'csrc' / 'include'}", f"-I{CPU}",
         "-DTWINFLOW_ISA=table", "-S", str(CPU / "kernels.cpp"), "-o", str(assembly)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arithmetic = re.findall(r"^\s+v?(?:fn?m(?:add|sub)\d+|mul|add|sub)([ps])s\s.*$", assembly.read_text(), re.MULTILINE)
    whole, single = (arithmetic.count(kind) for kind in "ps")
    assert whole > single, (whole, single)
    assert len(re.findall(rf"%{WIDEST[isa]}\d+", assembly.read_text())) > 3000
