"""Linear layers of a CPU: torch's own, oneDNN with the weight packed beforehand, MKL likewise, int8.

    OMP_NUM_THREADS=1 pytest benches/bench_linear.py --benchmark-only --benchmark-group-by=group

Rows are the tokens of a prompt (32), of a 256-pixel image (256) and of a 512-pixel one (1024); shapes
are those of the demo (144 wide), of a medium Z-Image (768) and of the 6B one (3840). `pack` is what
`passes.quantize` chooses for float32 and bfloat16, `int8` what precision="int8" does, quantization of
the activations included. Every contender is checked against float64 before it is timed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benches.op_suite import suite
from twinflow_rt.config import has_native
from twinflow_rt.ops.linear import (
    int8_mm,
    linear_packed,
    linear_upcast,
    pack,
    quantize_rows,
)

ROWS = (32, 256, 1024)
SHAPES = ((144, 432), (768, 2304), (3840, 3840))  # inputs, outputs
TOLERANCE = {"int8": 0.02, "bfloat16": 0.01, "bfloat16 pack": 0.01, "bfloat16 upcast": 0.01}


def contenders(x, w):
    """name -> a call that multiplies x [M, K] by w [N, K] transposed."""
    packed, half, small = pack(w), w.bfloat16(), x.bfloat16()
    weight = quantize_rows(w, torch.int8)
    calls = {
        "torch": lambda: F.linear(x, w),
        "pack": lambda: linear_packed(x, packed, None),
        "int8": lambda: int8_mm(*quantize_rows(x, torch.int8), *weight, None, x.dtype),
        "bfloat16 upcast": lambda: linear_upcast(small, half, None),
    }
    if torch.backends.mkl.is_available():
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(w, len(x))
        calls["mkl pack"] = lambda: torch.ops.mkl._mkl_linear(x, mkl, w, None, len(x))
    if has_native(torch.bfloat16, torch.device("cpu")):
        blocked = pack(half)
        calls["bfloat16"] = lambda: F.linear(small, half)
        calls["bfloat16 pack"] = lambda: linear_packed(small, blocked, None)
    return calls


NAMES = ("torch", "pack", "mkl pack", "int8", "bfloat16", "bfloat16 pack", "bfloat16 upcast")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_linear(benchmark, shape, rows, name):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*size, generator=generator) for size in ((rows, shape[0]), shape[::-1]))
    benchmark.group = f"{rows} rows, {shape[0]} -> {shape[1]}"
    with torch.inference_mode():
        calls = contenders(x, w * shape[0] ** -0.5)
        if name not in calls:
            pytest.skip("not on this machine")
        exact = F.linear(x.double(), w.double() * shape[0] ** -0.5)
        error = float((calls[name]().double() - exact).norm() / exact.norm())
        assert error < TOLERANCE.get(name, 1e-6), f"{name} is off by {error:.1e}"
        benchmark.extra_info["flops"] = 2 * rows * shape[0] * shape[1]
        benchmark.pedantic(calls[name], rounds=15, warmup_rounds=2)


test_rows = suite("quantize_rows", "linear_quantized")
