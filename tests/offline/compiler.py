"""Compiles what a launcher would launch, for any chip, on a machine without one.

`record` runs a launcher on meta tensors (real shapes, no memory) and keeps the launches it makes;
`build` specialises and compiles one of them exactly as Triton would on the chip, down to the cubin.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import triton
from torch._ops import OpOverload
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from twinflow_rt.kernels import launch

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a block


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    args: tuple
    options: dict


@dataclass(frozen=True)
class Built:
    """Resources of a compiled kernel: threads a block, registers and bytes of stack and local memory a thread,
    bytes of shared memory a block."""

    threads: int
    registers: int
    stack: int
    local: int
    shared: int
    ptx: str


class _Recorder:
    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        assert 0 < grid[0] < 2**31 and all(0 < n < 2**16 for n in grid[1:])
        return lambda *args, **options: self.launches.append(Launch(self.kernel, args, options))


def record(monkeypatch, module, arch: int, call: Callable) -> list[Launch]:
    """The launches that call() makes through `module` when its tensors are on a chip of `arch`."""
    launches: list[Launch] = []
    with monkeypatch.context() as patch:
        patch.setattr(launch, "arch", lambda x: arch)
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                patch.setattr(module, name, _Recorder(value, launches))
            elif isinstance(value, OpOverload):  # which does not launch for meta tensors
                patch.setattr(module, name, value.launch)
        call()
    return launches


def build(one: Launch, arch: int, folder: Path) -> Built:
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(one.kernel.signature, one.kernel.params, backend)
    bound, specialization, extra = binder(*one.args, **one.options)
    options, signature, constants, attrs = one.kernel._pack_args(backend, one.options, bound, specialization, extra)
    source = ASTSource(one.kernel, signature, constants, attrs)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder / "cache")
        compiled = triton.compile(source, target=target, options=options.__dict__)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    dump = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True)
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump.stdout)}
    ptx = compiled.asm["ptx"]
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])  # with the warps that specialisation adds
    return Built(threads, usage["REG"], usage["STACK"], usage["LOCAL"], compiled.metadata.shared, ptx)
