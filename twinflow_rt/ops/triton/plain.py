"""The Triton launchers as torch ops `twinflow::triton_*`, so that torch.compile and CUDA graphs see
one opaque call each, with its outputs' shapes and its mutations declared.

Importing this module imports triton. Every function has the signature of its eager reference in
ops/; outputs are contiguous (of the VAE's ops, channels last), views are made outside of the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels import attention as _attention
from ...kernels import decode, mlp, norm, rope, sample

_library = torch.library.Library("twinflow", "FRAGMENT")


def _op(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    name = schema.partition("(")[0]
    _library.define(schema)
    # every device: Triton's own interpreter runs these on the CPU
    _library.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"twinflow::{name}", fake, lib=_library)
    op: Callable[..., Any] = getattr(torch.ops.twinflow, name).default
    return op


def _like(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _two_like(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _halved(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    b, c, h, w = x.shape
    return x.new_empty((b, h, w, c), dtype=dtype).permute(0, 3, 1, 2)


def _joint(qkv: list[Tensor], *_: object) -> Tensor:
    first = qkv[0]
    return first.new_empty((first.shape[0], sum(x.shape[1] for x in qkv), first.shape[2]))


def _launch_joint(
    qkv: list[Tensor], q_weights: list[Tensor], k_weights: list[Tensor], cos: Tensor, sin: Tensor, heads: int,
    eps: float,
) -> Tensor:  # fmt: skip
    q: Tensor
    q, _, _ = rope.joint_qk_norm_rope(qkv, q_weights, k_weights, cos, sin, heads, eps)
    batch, seq, row = q.shape[0], q.shape[1], 3 * q.shape[2] * q.shape[3]
    return q.as_strided((batch, seq, row), (seq * row, row, 1))  # the buffer q, k and v are views of


def _launch_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> None:
    rope.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps)


def _launch_alone(x: Tensor, branch: Tensor, post: Tensor, eps: float) -> Tensor:
    total: Tensor = norm.residual_norm(x, branch, post, None, eps)[0]
    return total


rms_norm = _op("triton_rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", norm.rms_norm, _like)
layer_norm = _op(
    "triton_layer_norm(Tensor x, Tensor? weight, float eps, Tensor? bias=None) -> Tensor", norm.layer_norm, _like
)
_residual_norm = _op(
    "triton_residual_norm(Tensor x, Tensor branch, Tensor post, Tensor pre, float eps) -> (Tensor, Tensor)",
    norm.residual_norm, _two_like,
)  # fmt: skip
_residual_norm_alone = _op(
    "triton_residual_norm_alone(Tensor x, Tensor branch, Tensor post, float eps) -> Tensor", _launch_alone, _like
)
residual_layer_norm = _op(
    "triton_residual_layer_norm(Tensor x, Tensor branch, Tensor? gate, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor)",
    norm.residual_layer_norm, _two_like,
)  # fmt: skip
_qk_norm_rope = _op(
    "triton_qk_norm_rope_(Tensor(a!) qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int heads,"
    " float eps) -> ()",
    _launch_rope, lambda *_: None,
)  # fmt: skip
_joint_qk_norm_rope = _op(
    "triton_joint_qk_norm_rope(Tensor[] qkv, Tensor[] q_weights, Tensor[] k_weights, Tensor cos, Tensor sin, int heads,"
    " float eps) -> Tensor",
    _launch_joint, _joint,
)  # fmt: skip
attention = _op(
    "triton_attention(Tensor q, Tensor k, Tensor v, Tensor? lengths=None) -> Tensor",
    _attention.attention, lambda q, k, v, lengths=None: q.new_empty((*q.shape[:2], q.shape[2] * q.shape[3])),
)  # fmt: skip
linear_attention = _op(
    "triton_linear_attention(Tensor q, Tensor k, Tensor v) -> Tensor",
    _attention.linear_attention, lambda q, k, v: q.new_empty((*q.shape[:2], q.shape[2] * q.shape[3])),
)  # fmt: skip
swiglu = _op("triton_swiglu(Tensor x) -> Tensor", mlp.swiglu, _halved)
gelu_tanh = _op("triton_gelu_tanh(Tensor x) -> Tensor", mlp.gelu_tanh, _like)
x0_project = _op("triton_x0_project(Tensor x, Tensor velocity, float t=1.0) -> Tensor", sample.x0_project, _like)
to_uint8 = _op(
    "triton_to_uint8(Tensor image) -> Tensor",
    decode.to_uint8,
    lambda x: x.new_empty((x.shape[0], x.shape[2], x.shape[3], x.shape[1]), dtype=torch.uint8),
)
linear_swiglu = _op(
    "triton_linear_swiglu(Tensor x, Tensor weight) -> Tensor",
    mlp.linear_swiglu,
    lambda x, weight: x.new_empty((*x.shape[:-1], weight.shape[0] // 2)),
)
x0_to_vae = _op(
    "triton_x0_to_vae(Tensor x, Tensor velocity, float t, Tensor std, Tensor mean, ScalarType dtype) -> Tensor",
    decode.x0_to_vae,
    lambda x, velocity, t, std, mean, dtype: _channels_last(x, dtype),
)
group_norm_silu = _op(
    "triton_group_norm_silu(Tensor x, int groups, Tensor weight, Tensor bias, float eps) -> Tensor",
    decode.group_norm_silu, lambda x, *_: _channels_last(x, x.dtype),
)  # fmt: skip
rms_norm_silu = _op(
    "triton_rms_norm_silu(Tensor x, Tensor weight, float eps) -> Tensor",
    decode.rms_norm_silu, lambda x, *_: _channels_last(x, x.dtype),
)  # fmt: skip


def residual_norm(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See ops/norm.py."""
    if pre is None:
        return _residual_norm_alone(x, branch, post, eps), None
    x, h = _residual_norm(x, branch, post, pre, eps)
    return x, h


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops/rope.py; writes q and k in place."""
    _qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
    return q, k, v


def joint_qk_norm_rope(
    qkv: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor],
    cos: Tensor, sin: Tensor, heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ops/rope.py; the results are views of one joint buffer."""
    joint = _joint_qk_norm_rope(list(qkv), list(q_weights), list(k_weights), cos, sin, heads, eps)
    q, k, v = joint.unflatten(-1, (3, heads, -1)).unbind(-3)
    return q, k, v
