"""The activations of ops/mlp.py by the kernels of csrc."""

from __future__ import annotations

import torch
from torch import Tensor

from .register import Pair, fresh, like, op, quantized, quantized_like, run, stored


def _halves(x: Tensor) -> tuple[Tensor, int]:
    """x, contiguous, and the size of the halves of its last axis."""
    hidden = x.shape[-1] // 2
    if hidden * 2 != x.shape[-1] or not hidden:
        raise ValueError(f"swiglu halves the last axis, which has {x.shape[-1]} elements")
    return x.contiguous(), hidden


def _halved(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@op("swiglu(Tensor x) -> Tensor", _halved)
def swiglu(x: Tensor) -> Tensor:
    x, hidden = _halves(x)
    out = x.new_empty((*x.shape[:-1], hidden))
    run("swiglu", x, x.data_ptr(), stored(out), out.numel() // hidden, hidden)
    return out


def _halved_quantized(x: Tensor, dtype: torch.dtype) -> Pair:
    return quantized_like(x, dtype, width=x.shape[-1] // 2)


@op("swiglu_quantized(Tensor x, ScalarType dtype) -> (Tensor, Tensor)", _halved_quantized)
def swiglu_quantized(x: Tensor, dtype: torch.dtype) -> Pair:
    x, hidden = _halves(x)
    made, out = quantized(x, dtype, hidden)
    run("swiglu", x, x.data_ptr(), out, made[1].numel(), hidden)
    return made


@op("gelu_tanh(Tensor x) -> Tensor", like)
def gelu_tanh(x: Tensor) -> Tensor:
    x = x.contiguous()
    out, width = fresh(x), max(x.shape[-1], 1)
    run("gelu_tanh", x, x.data_ptr(), stored(out), out.numel() // width, width)
    return out


@op("gelu_tanh_quantized(Tensor x, ScalarType dtype) -> (Tensor, Tensor)", quantized_like)
def gelu_tanh_quantized(x: Tensor, dtype: torch.dtype) -> Pair:
    x, (made, out) = x.contiguous(), quantized(x, dtype)
    run("gelu_tanh", x, x.data_ptr(), out, made[1].numel(), x.shape[-1])
    return made
