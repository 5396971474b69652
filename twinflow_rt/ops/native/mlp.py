"""The activations of ops/mlp.py by the kernels of csrc."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .register import like, op_and_quantized, quantized_like, results, run


def _swiglu(x: Tensor, dtype: torch.dtype | None = None) -> Any:
    hidden = x.shape[-1] // 2
    if hidden * 2 != x.shape[-1] or not hidden:
        raise ValueError(f"swiglu halves the last axis, which has {x.shape[-1]} elements")
    x, (made, out) = x.contiguous(), results(x, dtype, hidden)
    run("swiglu", x, x.data_ptr(), out, x.numel() // (2 * hidden), hidden)
    return made


swiglu, swiglu_quantized = op_and_quantized(
    "swiglu(Tensor x) -> Tensor",
    lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    lambda x, dtype: quantized_like(x, dtype, width=x.shape[-1] // 2),
)(_swiglu)


def _gelu_tanh(x: Tensor, dtype: torch.dtype | None = None) -> Any:
    x, (made, out), width = x.contiguous(), results(x, dtype), max(x.shape[-1], 1)
    run("gelu_tanh", x, x.data_ptr(), out, x.numel() // width, width)
    return made


gelu_tanh, gelu_tanh_quantized = op_and_quantized("gelu_tanh(Tensor x) -> Tensor", like, quantized_like)(_gelu_tanh)
