"""The norms of ops/norm.py by the kernels of csrc, with torch around those of images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .register import check_like, fresh, like, op, op_and_quantized, quantized_like, results, roomy, rows_of, run
from .register import weights_of as weights


def _sum_and_quantized_like(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), *quantized_like(x, *rest)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Any:
    (made, out), (rows, shape) = results(x, dtype), rows_of(x)
    run("rms_norm", x, rows, weights(weight, x), out, shape, eps)
    return made


rms_norm, rms_norm_quantized = op_and_quantized(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", like, quantized_like
)(_rms_norm)


def _layer_norm(
    x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Any:
    (made, out), (rows, shape) = results(x, dtype), rows_of(x)
    run("layer_norm", x, rows, weights(weight, x), weights(bias, x), out, shape, eps)
    return made


layer_norm, layer_norm_quantized = op_and_quantized(
    "layer_norm(Tensor x, Tensor? weight, float eps, Tensor? bias=None) -> Tensor", like, quantized_like
)(_layer_norm)


def _one_or_two_like(x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float) -> list[Tensor]:
    return [like(x) for _ in range(1 if pre is None else 2)]


def _residual_norm(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> Any:
    check_like("branch", x, branch)
    made: Any
    total, (made, out) = fresh(x), (None, (0, 0, 0)) if pre is None else results(x, dtype)
    (rows, shape), (added, _) = rows_of(x), rows_of(branch)
    run("residual_norm", x, rows, added, weights(post, x), weights(pre, x), total.data_ptr(), out, shape, eps)
    if dtype is not None:
        return total, *made
    return [total] if made is None else [total, made]


_residual_norm_plain, residual_norm_quantized = op_and_quantized(
    "residual_norm(Tensor x, Tensor branch, Tensor post, Tensor? pre, float eps) -> Tensor[]",
    _one_or_two_like, _sum_and_quantized_like,
)(_residual_norm)  # fmt: skip


def residual_norm(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See ops/norm.py; a registered op cannot return None."""
    out = _residual_norm_plain(x, branch, post, pre, eps)
    return out[0], None if pre is None else out[1]


def _residual_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    check_like("branch", x, branch)
    total, (made, out) = fresh(x), results(x, dtype)
    (rows, shape), (added, _) = rows_of(x), rows_of(branch)
    affine = weights(gate, x), weights(weight, x), weights(bias, x)
    run("residual_layer_norm", x, rows, added, *affine, total.data_ptr(), out, shape, eps)
    return (total, made) if dtype is None else (total, *made)


residual_layer_norm, residual_layer_norm_quantized = op_and_quantized(
    "residual_layer_norm(Tensor x, Tensor branch, Tensor? gate, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor)",
    lambda x, *_: (like(x), like(x)), _sum_and_quantized_like,
)(_residual_layer_norm)  # fmt: skip


@op(
    "group_norm_silu(Tensor x, int groups, Tensor weight, Tensor bias, float eps) -> Tensor",
    lambda x, *_: torch.empty_like(x, memory_format=torch.channels_last),
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
