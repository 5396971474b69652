"""The norms of ops/norm.py by the kernels of csrc, with torch around those of images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .register import Pair, check_like, fresh, like, op, quantized, quantized_like, roomy, rows_of, run, stored
from .register import weights_of as weights


@op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", like)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out, (rows, shape) = fresh(x), rows_of(x)
    run("rms_norm", x, rows, weights(weight, x), stored(out), shape, eps)
    return out


@op("rms_norm_quantized(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)", quantized_like)
def rms_norm_quantized(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Pair:
    (made, out), (rows, shape) = quantized(x, dtype), rows_of(x)
    run("rms_norm", x, rows, weights(weight, x), out, shape, eps)
    return made


@op("layer_norm(Tensor x, Tensor? weight, float eps, Tensor? bias=None) -> Tensor", like)
def layer_norm(x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None = None) -> Tensor:
    out, (rows, shape) = fresh(x), rows_of(x)
    run("layer_norm", x, rows, weights(weight, x), weights(bias, x), stored(out), shape, eps)
    return out


@op(
    "layer_norm_quantized(Tensor x, Tensor? weight, float eps, Tensor? bias, ScalarType dtype) -> (Tensor, Tensor)",
    quantized_like,
)
def layer_norm_quantized(
    x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None, dtype: torch.dtype
) -> Pair:  # fmt: skip
    (made, out), (rows, shape) = quantized(x, dtype), rows_of(x)
    run("layer_norm", x, rows, weights(weight, x), weights(bias, x), out, shape, eps)
    return made


def _one_or_two_like(x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float) -> list[Tensor]:
    return [like(x) for _ in range(1 if pre is None else 2)]


@op(
    "residual_norm(Tensor x, Tensor branch, Tensor post, Tensor? pre, float eps) -> Tensor[]",
    _one_or_two_like,
)
def _residual_norm(x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float) -> list[Tensor]:
    check_like("branch", x, branch)
    total, normed = fresh(x), None if pre is None else fresh(x)
    (rows, shape), (added, _) = rows_of(x), rows_of(branch)
    after, before = weights(post, x), weights(pre, x)
    run("residual_norm", x, rows, added, after, before, total.data_ptr(), stored(normed), shape, eps)
    return [total] if normed is None else [total, normed]


def residual_norm(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See ops/norm.py; a registered op cannot return None."""
    out = _residual_norm(x, branch, post, pre, eps)
    return out[0], None if pre is None else out[1]


def _sum_and_quantized_like(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), *quantized_like(x, *rest)


@op(
    "residual_norm_quantized(Tensor x, Tensor branch, Tensor post, Tensor pre, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    _sum_and_quantized_like,
)
def residual_norm_quantized(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    check_like("branch", x, branch)
    total, (made, out) = fresh(x), quantized(x, dtype)
    (rows, shape), (added, _) = rows_of(x), rows_of(branch)
    run("residual_norm", x, rows, added, weights(post, x), weights(pre, x), total.data_ptr(), out, shape, eps)
    return total, *made


def _two_like(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like(x), like(x)


@op(
    "residual_layer_norm(Tensor x, Tensor branch, Tensor? gate, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor)",
    _two_like,
)
def residual_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    check_like("branch", x, branch)
    total, normed = fresh(x), fresh(x)
    (rows, shape), (added, _) = rows_of(x), rows_of(branch)
    affine = weights(gate, x), weights(weight, x), weights(bias, x)
    run("residual_layer_norm", x, rows, added, *affine, total.data_ptr(), stored(normed), shape, eps)
    return total, normed


@op(
    "residual_layer_norm_quantized(Tensor x, Tensor branch, Tensor? gate, Tensor? weight, Tensor? bias, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _sum_and_quantized_like,
)
def residual_layer_norm_quantized(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_like("branch", x, branch)
    total, (made, out) = fresh(x), quantized(x, dtype)
    (rows, shape), (added, _) = rows_of(x), rows_of(branch)
    affine = weights(gate, x), weights(weight, x), weights(bias, x)
    run("residual_layer_norm", x, rows, added, *affine, total.data_ptr(), out, shape, eps)
    return total, *made


def _like_channels_last(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@op(
    "group_norm_silu(Tensor x, int groups, Tensor weight, Tensor bias, float eps) -> Tensor",
    _like_channels_last,
)
def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    if channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"{channels} channels do not divide into {groups} groups, or weight and bias are not of them")
    if weight.dtype != x.dtype or bias.dtype != x.dtype:
        raise TypeError(f"weight and bias are {x.dtype} like x, not {weight.dtype} and {bias.dtype}")
    out = roomy(torch.empty_like(x))
    scratch = x.new_empty((batch, 32 * channels), dtype=torch.float32)
    tensors = (x, weight.contiguous(), bias.contiguous(), out, scratch)
    run("group_norm_silu", x, *(t.data_ptr() for t in tensors), (batch, height * width, channels), groups, eps)
    return out


def rms_norm_silu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py; the norm, rounded, then torch's SiLU in place."""
    rows = x.permute(0, 2, 3, 1).contiguous()  # already so where memory is channels-last
    return F.silu(rms_norm(rows, weight, eps), inplace=True).permute(0, 3, 1, 2)
