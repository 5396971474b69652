"""Activations of the feed-forward blocks, alone and behind the linear layer before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .declaration import COMPILED, Op, op
from .linear import Quantizing, quantize_rows


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b for x = a | b on the last axis (SwiGLU, arXiv 2002.05202).

    x: [..., 2*hidden], the output of the merged w1|w3 projection. Returns [..., hidden] in x's dtype.
    float32 inside, one rounding.
    """
    a, b = x.chunk(2, -1)
    return (F.silu(a.float()) * b.float()).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))   (GELU's tanh form, arXiv 1606.08415).

    x: any shape, any float dtype; returns the same. float32 inside, one rounding.
    """
    return F.gelu(x.float(), approximate="tanh").to(x.dtype)


def swiglu_quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`swiglu`, then `quantize_rows` to `dtype` with no rounding between: (values [..., hidden], scales [..., 1])."""
    return quantize_rows(swiglu(x.float()), dtype)


def gelu_tanh_quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`gelu_tanh`, then `quantize_rows` to `dtype` with no rounding between: (values [..., D], scales [..., 1])."""
    return quantize_rows(gelu_tanh(x.float()), dtype)


# -- with the linear layer: rounding points are the product, which an implementation may keep in float32, and the result


def linear_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """`swiglu` of the merged w1|w3 projection: silu(x w1^T) * (x w3^T).

    x: [..., K]; weight: [2*hidden, K], w1 above w3, in x's dtype. Returns [..., hidden] in x's dtype.
    """
    return swiglu(F.linear(x, weight))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu_tanh` of a projection: gelu(x weight^T + bias).

    x: [..., K]; weight: [N, K] and bias: [N], in x's dtype. Returns [..., N] in x's dtype.
    """
    return gelu_tanh(F.linear(x, weight, bias))


def linear_residual(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual + x weight^T.

    residual: [..., N]; x: [..., K]; weight: [N, K]; of one dtype, which the result, [..., N], has.
    """
    return residual + F.linear(x, weight)


# -- the same by what cuBLAS does to a product before it writes it -----------------------------------------


def linear_gelu_epilogue(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear_gelu` on an NVIDIA GPU: tanh-GELU in cuBLASLt's epilogue. (On a CPU torch computes another
    GELU under this name, the exact one.)"""
    y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return y.view(*x.shape[:-1], len(weight))


def linear_residual_epilogue(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`linear_residual` as one product that adds to what is there (beta = 1)."""
    return torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), weight.t()).view(residual.shape)


@dataclass(frozen=True)
class MlpOps:
    """Activations as a network calls them."""

    swiglu: Op = op(swiglu, *COMPILED)
    gelu_tanh: Op = op(gelu_tanh, *COMPILED)
    linear_swiglu: Op = op(linear_swiglu, "triton", "separate")
    linear_gelu: Op = op(linear_gelu, "cublaslt", "separate")
    linear_residual: Op = op(linear_residual, "cublas")


@dataclass(frozen=True)
class QuantizedMlpOps:
    """Activations that feed quantized layers."""

    swiglu_quantized: Quantizing = op(swiglu_quantized, *COMPILED)
    gelu_tanh_quantized: Quantizing = op(gelu_tanh_quantized, *COMPILED)
