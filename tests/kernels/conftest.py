"""Runs the Triton kernels of this folder in Triton's interpreter, on the CPU, with poisoned outputs.

Every kernel is swapped for its interpreted twin while a test runs. TRITON_INTERPRET is not used: it
acts when triton is first imported, and would reach the tests that compile the same kernels.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

MODULES = ("attention", "attention_fp8", "decode", "int4", "linear", "mlp", "norm", "nvfp4", "rope", "sample")


def _interpret(monkeypatch, module) -> None:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for name, value in list(vars(module).items()):
        if isinstance(value, JITFunction):
            monkeypatch.setattr(module, name, InterpretedFunction(value.fn))


def _mend(monkeypatch) -> None:
    """Narrow floats as a GPU has them: the interpreter truncates bfloat16 and multiplies its bit patterns."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot
    dtypes = {
        tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }  # fmt: skip

    def rounded(data, source, target, mode):
        source, target = dtypes[source], dtypes[target]
        bits = torch.from_numpy(np.ascontiguousarray(data).view(f"i{source.itemsize}")).view(source).to(target)
        return bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[target.itemsize]).numpy()

    def widened(self, a, b, d, precision, imprecise):
        plain = (tl.float32, tl.int8)
        a, b = (x if x.dtype.scalar in plain else self.create_fp_to_fp(x, tl.float32, None) for x in (a, b))
        return dot(self, a, b, d, precision, imprecise)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)


def _products_of_nvfp4(monkeypatch) -> None:
    """cuBLAS's product by its definition, with group scales where it reads them."""
    from twinflow_rt.kernels import nvfp4
    from twinflow_rt.ops.nvfp4 import dequantize_nvfp4

    def plain(packed, scales, whole):
        r, c = torch.arange(len(packed))[:, None], torch.arange(packed.shape[1] // 8)
        tile = r // 128 * (scales.shape[1] // 4) + c // 4
        groups = scales.flatten()[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4]
        return dequantize_nvfp4(packed, groups, None, whole)

    def product(rows, weight, bias, dtype):
        y = plain(*rows) @ plain(*weight).t()
        return (y if bias is None else y + bias).to(dtype)

    monkeypatch.setattr(nvfp4, "product", product)


def _patch_language(monkeypatch):
    """Patches triton.language once for the test; returns what undoes it.

    The interpreter patches it anew for every call of a jitted function and forgets to undo the calls
    made from inside a kernel, after which nothing in the process compiles any more.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
    return scope.restore


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    import triton
    import triton.language as tl

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    _interpret(monkeypatch, tl.standard)
    for name in ("sum", "max"):  # the only ones of triton's own jitted functions that the kernels call
        monkeypatch.setattr(tl, name, getattr(tl.standard, name))
    for name in MODULES:
        _interpret(monkeypatch, import_module(f"twinflow_rt.kernels.{name}"))
    _mend(monkeypatch)
    _products_of_nvfp4(monkeypatch)
    restore = _patch_language(monkeypatch)
    yield
    restore()


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty hands out NaN (the largest value, of integers): what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
