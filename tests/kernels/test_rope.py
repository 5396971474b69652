"""QK norm + rotation against complex float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, draw, judge, strided

from twinflow_rt import ops
from twinflow_rt.kernels import rope

SHAPES = ((1, 1, 1, 2), (2, 5, 3, 48), (1, 37, 2, 36), (2, 3, 30, 128), (1, 4, 5, 96), (2, 0, 2, 8))  # B, S, H, D
EPS = 1e-5


def angles(b, s, d):
    a = draw(b, s, d // 2, seed=9)
    return a.cos(), a.sin()


def exact(x, w, cos, sin):
    """x: [B, S, H, D]"""
    x = x.double()
    x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * w.double()
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin).unsqueeze(-2)
    return torch.view_as_real(turned.to(torch.complex128)).flatten(-2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_qk_norm_rope(shape, dtype, shared):
    b, s, h, d = shape
    qkv = draw(b, s, 3 * h * d, dtype=dtype)
    q_weight, k_weight = 1 + 0.3 * draw(d, seed=1), 1 + 0.3 * draw(d, seed=2)
    cos, sin = angles(1 if shared else b, s, d)
    eager = ops.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, h, EPS)
    source = strided(qkv) if qkv.numel() else qkv.clone()
    got = rope.qk_norm_rope(source, q_weight, k_weight, cos, sin, h, EPS)
    q, k, v = qkv.unflatten(-1, (3, h, -1)).unbind(-3)
    judge(got[0], eager[0], exact(q, q_weight, cos, sin))
    judge(got[1], eager[1], exact(k, k_weight, cos, sin))
    assert torch.equal(got[2], v)
    assert all(x.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() for x in got)


def test_writes_nothing_outside_q_and_k():
    b, s, h, d = 2, 3, 3, 36
    source = strided(draw(b, s, 3 * h * d, dtype=torch.float16))
    buffer = torch.as_strided(source, (source.untyped_storage().nbytes() // 2,), (1,), 0)
    gaps = buffer.isnan().clone()
    rope.qk_norm_rope(source, draw(d), draw(d), *angles(1, s, d), h, EPS)
    assert gaps.any() and torch.equal(buffer.isnan(), gaps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_qk_norm_rope(dtype):
    b, lengths, h, d = 2, (3, 5), 3, 32
    streams = [draw(b, s, 3 * h * d, dtype=dtype, seed=s) for s in lengths]
    q_weights, k_weights = ([1 + 0.3 * draw(d, seed=i + j) for i in (1, 2)] for j in (0, 5))
    cos, sin = angles(1, sum(lengths), d)
    eager = ops.joint_qk_norm_rope(streams, q_weights, k_weights, cos, sin, h, EPS)
    got = rope.joint_qk_norm_rope([strided(x) for x in streams], q_weights, k_weights, cos, sin, h, EPS)
    pieces = cos.split(lengths, 1), sin.split(lengths, 1)
    for i, weights in enumerate((q_weights, k_weights)):
        parts = zip([x.unflatten(-1, (3, h, -1))[:, :, i] for x in streams], weights, *pieces, strict=True)
        judge(got[i], eager[i], torch.cat([exact(*part) for part in parts], 1))
    assert torch.equal(got[2], eager[2])


def test_refusals():
    qkv, w, (cos, sin) = draw(1, 2, 24), draw(8), angles(1, 2, 8)
    with pytest.raises(ValueError, match="3\\*5\\*D"):
        rope.qk_norm_rope(qkv, w, w, cos, sin, 5, EPS)
    with pytest.raises(ValueError, match="cos"):
        rope.qk_norm_rope(qkv, w, w, cos[:, :1], sin[:, :1], 1, EPS)
    with pytest.raises(ValueError, match="norm weights"):
        rope.qk_norm_rope(qkv, w[:4], w, cos, sin, 1, EPS)
    with pytest.raises(ValueError, match="even head dim"):
        rope.qk_norm_rope(draw(1, 2, 9), draw(3), draw(3), *angles(1, 2, 3), 1, EPS)


@pytest.mark.parametrize("heads, head_dim", [(1, 2), (3, 48), (30, 128), (24, 128), (1, 512)])
def test_config(heads, head_dim):
    c = rope.config(heads, head_dim)
    assert 2 * c.pairs >= head_dim and c.heads * c.pairs <= 1024 and c.warps <= 4 and c.heads < 2 * heads
