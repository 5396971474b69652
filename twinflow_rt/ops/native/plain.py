"""The native kernels (csrc/) as torch ops `twinflow::*`, with the signatures of the eager references.

On the CPU they run in the extension `_native`, on an NVIDIA GPU in `libtwinflow_cuda` (library.py).
Where one is absent the ops raise DeviceError, and the op table keeps another implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .register import as_rows, fake, fresh, halves, op, roomy, run, same, weight_of

# -- norm -------------------------------------------------------------------------------------------------


@op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = fresh(x)
    rows, *strides = as_rows(x)
    _held, address, each = weight_of(weight, x)
    run("rms_norm", x, rows.data_ptr(), *strides, address, each, out.data_ptr(), *rows.shape, eps)
    return out


@op("layer_norm(Tensor x, Tensor? weight, float eps, Tensor? bias=None) -> Tensor")
def layer_norm(x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None = None) -> Tensor:
    out = fresh(x)
    rows, *strides = as_rows(x)
    (_held, *w), (_too, *b) = weight_of(weight, x), weight_of(bias, x)
    run("layer_norm", x, rows.data_ptr(), *strides, *w, *b, out.data_ptr(), *rows.shape, eps)
    return out


@op("residual_norm(Tensor x, Tensor branch, Tensor post, Tensor? pre, float eps) -> Tensor[]")
def _residual_norm(x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float) -> list[Tensor]:
    same("branch", x, branch)
    total, normed = fresh(x), None if pre is None else fresh(x)
    (a, *a_strides), (b, *b_strides) = as_rows(x), as_rows(branch)
    (_held, *after), (_too, *before) = weight_of(post, x), weight_of(pre, x)
    run(
        "residual_norm", x, a.data_ptr(), *a_strides, b.data_ptr(), *b_strides, *after, *before, total.data_ptr(),
        0 if normed is None else normed.data_ptr(), *a.shape, eps,
    )  # fmt: skip
    return [total] if normed is None else [total, normed]


@op(
    "residual_layer_norm(Tensor x, Tensor branch, Tensor? gate, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor)"
)
def residual_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    same("branch", x, branch)
    total, normed = fresh(x), fresh(x)
    (a, *a_strides), (b, *b_strides) = as_rows(x), as_rows(branch)
    kept = [weight_of(w, x) for w in (gate, weight, bias)]
    places = [place for _, *one in kept for place in one]
    run(
        "residual_layer_norm", x, a.data_ptr(), *a_strides, b.data_ptr(), *b_strides, *places, total.data_ptr(),
        normed.data_ptr(), *a.shape, eps,
    )  # fmt: skip
    return total, normed


def residual_norm(
    x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See ops/norm.py."""
    out = _residual_norm(x, branch, post, pre, eps)
    return out[0], None if pre is None else out[1]


# -- rope -------------------------------------------------------------------------------------------------


def _rotate(
    qkv: Tensor, out: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
    parts: int,
) -> None:  # fmt: skip
    """q and k (parts 3: and v) of qkv [B, S, 3*H*D] to the same places of out, in any batch and row strides."""
    batch, seq, width = qkv.shape
    dim = width // (3 * heads)
    if dim * 3 * heads != width or dim % 2 or dim == 0 or qkv.stride(2) != 1:
        raise ValueError(f"qkv must be [B, S, 3 * {heads} * even] with adjacent elements, got {tuple(qkv.shape)}")
    (_held, q_address), (_too, k_address) = _head_weight(q_weight, qkv, dim), _head_weight(k_weight, qkv, dim)
    cos, sin, *angle_strides = _angles(cos, sin, qkv, dim // 2)
    run(
        "qk_norm_rope", qkv, qkv.data_ptr(), *qkv.stride()[:2], heads * dim, out.data_ptr(), *out.stride()[:2],
        heads * dim, q_address, k_address, cos.data_ptr(), sin.data_ptr(), *angle_strides, batch, seq, heads, dim,
        parts, eps,
    )  # fmt: skip


def _head_weight(weight: Tensor | None, qkv: Tensor, dim: int) -> tuple[Tensor | None, int]:
    """The weight [D] of a norm of heads, or None; and its address."""
    if weight is None:
        return None, 0
    if weight.shape != (dim,):
        raise ValueError(f"norm weights of heads are [{dim}], not {tuple(weight.shape)}")
    if weight.dtype != torch.float32 or weight.device != qkv.device:
        raise TypeError(f"norm weights are float32 on {qkv.device}, not {weight.dtype} on {weight.device}")
    weight = weight.contiguous()
    return weight, weight.data_ptr()


def _angles(cos: Tensor, sin: Tensor, qkv: Tensor, half: int) -> tuple[Tensor, Tensor, int, int]:
    """cos and sin with adjacent elements; their stride between samples (0: shared), and between rows."""
    (batch, seq, _), shape, device = qkv.shape, cos.shape, qkv.device
    if shape not in ((1, seq, half), (batch, seq, half)) or sin.shape != shape:
        raise ValueError(f"cos and sin are [{batch} or 1, {seq}, {half}], not {tuple(shape)}, {tuple(sin.shape)}")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.device != device or sin.device != device:
        raise TypeError(f"cos and sin are float32 on {device}")
    strides = cos.stride()
    if strides != sin.stride() or strides[2] != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
        strides = cos.stride()
    return cos, sin, 0 if shape[0] == 1 else strides[0], strides[1]


@op(
    "qk_norm_rope_(Tensor(a!) qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int heads, float eps)"
    " -> ()"
)
def _qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> None:
    _rotate(qkv, qkv, q_weight, k_weight, cos, sin, heads, eps, parts=2)


@op(
    "joint_qk_norm_rope(Tensor[] qkv, Tensor[] q_weights, Tensor[] k_weights, Tensor cos, Tensor sin, int heads,"
    " float eps) -> Tensor"
)
def _joint_qk_norm_rope(
    qkv: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor], cos: Tensor, sin: Tensor,
    heads: int, eps: float,
) -> Tensor:  # fmt: skip
    joint, lengths = _joint_buffer(qkv), [x.shape[1] for x in qkv]
    pieces = joint.split(lengths, 1), cos.split(lengths, 1), sin.split(lengths, 1)
    for x, q_weight, k_weight, out, c, s in zip(qkv, q_weights, k_weights, *pieces, strict=True):
        if x.dtype != joint.dtype or x.shape[0] != joint.shape[0] or x.shape[2] != joint.shape[2]:
            raise ValueError("streams of one joint sequence differ in length only")
        _rotate(x if x.stride(2) == 1 else x.contiguous(), out, q_weight, k_weight, c, s, heads, eps, parts=3)
    return joint


def _joint_buffer(qkv: Sequence[Tensor], *_: Any) -> Tensor:
    return qkv[0].new_empty((qkv[0].shape[0], sum(x.shape[1] for x in qkv), qkv[0].shape[2]))


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops/rope.py; writes q and k in place."""
    _qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps)
    q, k, v = torch.unflatten(qkv, -1, (3, heads, -1)).unbind(-3)
    return q, k, v


def joint_qk_norm_rope(
    qkv: Sequence[Tensor], q_weights: Sequence[Tensor], k_weights: Sequence[Tensor],
    cos: Tensor, sin: Tensor, heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ops/rope.py; the results are views of one joint buffer."""
    joint = _joint_qk_norm_rope(list(qkv), list(q_weights), list(k_weights), cos, sin, heads, eps)
    q, k, v = torch.unflatten(joint, -1, (3, heads, -1)).unbind(-3)
    return q, k, v


@op(
    "grouped_qk_norm_rope_(Tensor(a!) qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int heads,"
    " int kv_heads, float eps) -> ()"
)
def _grouped_qk_norm_rope(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int,
    kv_heads: int, eps: float,
) -> None:  # fmt: skip
    (batch, seq, width), (rows, row, adjacent) = qkv.shape, qkv.stride()
    dim = width // (heads + 2 * kv_heads)
    if dim * (heads + 2 * kv_heads) != width or dim % 2 or dim == 0 or adjacent != 1:
        raise ValueError(
            f"qkv must be [B, S, {heads} + 2 * {kv_heads} heads of an even size] with adjacent elements, "
            f"got {tuple(qkv.shape)}"
        )
    (_held, q_address), (_too, k_address) = _head_weight(q_weight, qkv, dim), _head_weight(k_weight, qkv, dim)
    cos, sin, *angle_strides = _angles(cos, sin, qkv, dim // 2)
    run(
        "grouped_qk_norm_rope", qkv, qkv.data_ptr(), rows, row, q_address, k_address, cos.data_ptr(), sin.data_ptr(),
        *angle_strides, batch, seq, heads, kv_heads, dim, eps,
    )  # fmt: skip


def grouped_qk_norm_rope(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int,
    kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ops/rope.py; writes q and k in place."""
    _grouped_qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, kv_heads, eps)
    parts = torch.unflatten(qkv, -1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = parts.split_with_sizes((heads, kv_heads, kv_heads), 1)
    return q, k, v


# -- mlp, sample, decode ------------------------------------------------------------------------------------


@op("swiglu(Tensor x) -> Tensor")
def swiglu(x: Tensor) -> Tensor:
    x, hidden = halves(x)
    out = x.new_empty((*x.shape[:-1], hidden))
    run("swiglu", x, x.data_ptr(), out.data_ptr(), out.numel() // hidden, hidden)
    return out


@op("gelu_tanh(Tensor x) -> Tensor")
def gelu_tanh(x: Tensor) -> Tensor:
    x = x.contiguous()
    out, width = fresh(x), max(x.shape[-1], 1)
    run("gelu_tanh", x, x.data_ptr(), out.data_ptr(), out.numel() // width, width)
    return out


@op("x0_project(Tensor x, Tensor velocity, float t=1.0) -> Tensor")
def x0_project(x: Tensor, velocity: Tensor, t: float = 1.0) -> Tensor:
    same("velocity", x, velocity)
    x, velocity = x.contiguous(), velocity.contiguous()
    out = fresh(x)
    run("x0_project", x, x.data_ptr(), velocity.data_ptr(), out.data_ptr(), x.numel(), t)
    return out


@op("group_norm_silu(Tensor x, int groups, Tensor weight, Tensor bias, float eps) -> Tensor")
def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See ops/decode.py."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    if channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"{channels} channels do not divide into {groups} groups, or weight and bias are not of them")
    if weight.dtype != x.dtype or bias.dtype != x.dtype:
        raise TypeError(f"weight and bias are {x.dtype} like x, not {weight.dtype} and {bias.dtype}")
    out = roomy(torch.empty_like(x))
    scratch = x.new_empty((batch, 32 * channels), dtype=torch.float32)
    tensors = (x, weight.contiguous(), bias.contiguous(), out, scratch)
    run("group_norm_silu", x, *(t.data_ptr() for t in tensors), batch, height * width, channels, groups, eps)
    return out


def rms_norm_silu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/decode.py; the norm, rounded, then torch's SiLU in place."""
    rows = x.permute(0, 2, 3, 1).contiguous()  # already so where memory is channels-last
    return F.silu(rms_norm(rows, weight, eps), inplace=True).permute(0, 3, 1, 2)


@op("to_uint8(Tensor image) -> Tensor")
def to_uint8(image: Tensor) -> Tensor:
    batch, channels, height, width = image.shape
    out = image.new_empty((batch, height, width, channels), dtype=torch.uint8)
    run("to_uint8", image, image.data_ptr(), image.stride(), out.data_ptr(), batch, channels, height, width)
    return out


# -- what torch.compile must know of the results ------------------------------------------------------------


@fake("rms_norm", "layer_norm", "gelu_tanh", "x0_project")
def _like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@fake("group_norm_silu")
def _like_channels_last(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@fake("residual_norm")
def _one_or_two_like(x: Tensor, branch: Tensor, post: Tensor, pre: Tensor | None, eps: float) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in range(1 if pre is None else 2)]


@fake("residual_layer_norm")
def _two_like(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


fake("qk_norm_rope_", "grouped_qk_norm_rope_")(lambda *_: None)
fake("joint_qk_norm_rope")(_joint_buffer)


@fake("swiglu")
def _halved(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@fake("to_uint8")
def _bytes(image: Tensor) -> Tensor:
    b, c, h, w = image.shape
    return image.new_empty((b, h, w, c), dtype=torch.uint8)
