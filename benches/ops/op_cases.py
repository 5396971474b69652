"""Every op at the sizes its networks run it: inputs, float64 arithmetic to judge by, bytes and FLOPs.

One table serves the GPU tests, the kernel benchmarks and the GPU kit, so that whatever is timed was
checked on the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benches.ops.case import (
    EPS,
    Case,
    Draw,
    Drawing,
    Sizes,
    exact_attention,
    exact_bytes,
    exact_gelu,
    exact_layer,
    exact_linear_attention,
    exact_rms,
    exact_rope,
    exact_rope_of_halves,
    exact_swiglu,
)
from benches.ops.layer_cases import decoding, products


def cases(sizes: Sizes, dtype: torch.dtype, device: torch.device | str, batch: int = 1) -> list[Case]:
    """Return one case or more per op of `OpTable`; inputs are drawn in float32 and rounded to `dtype`."""
    draw = Draw(dtype, torch.device(device))
    kinds = (_norms, _ropes, _attentions, _pointwise, products, decoding)
    return [case for kind in kinds for case in kind(sizes, draw, batch)]


def _norms(s: Sizes, draw: Draw, b: int) -> list[Case]:
    shape, one = (b, s.tokens, s.width), b * s.tokens * s.width * draw.item
    w: Drawing = lambda seed=1: draw.weight(1, 1, s.width, seed=seed)
    bias: Drawing = lambda: w(3) - 1
    x: Drawing = lambda: draw(*shape)
    branch: Drawing = lambda: draw(*shape, seed=5)

    def residual(x: Tensor, branch: Tensor, post: Tensor, pre: Tensor, eps: float) -> tuple[Tensor, ...]:
        total = x.double() + exact_rms(branch, post, eps)
        return total, exact_rms(total.to(x.dtype), pre, eps)

    def gated(x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        total = x.double() + gate.double() * branch.double()
        return total, exact_layer(total.to(x.dtype), weight, eps, bias)

    return [
        Case("rms_norm", "rms_norm", lambda: (x(), w(), EPS), lambda x, w, e: (exact_rms(x, w, e),), 2 * one),
        Case("layer_norm", "layer_norm", lambda: (x(), w(), EPS, bias()),
             lambda x, w, e, b: (exact_layer(x, w, e, b),), 2 * one),
        Case("residual_norm", "residual_norm", lambda: (x(), branch(), w(), w(2), EPS), residual, 4 * one),
        Case("residual_layer_norm", "residual_layer_norm", lambda: (x(), branch(), bias(), w(), bias(), EPS), gated,
             4 * one),
    ]  # fmt: skip


def _ropes(s: Sizes, draw: Draw, b: int) -> list[Case]:
    one, table = b * s.tokens * s.width * draw.item, s.tokens * s.head_dim * 4
    qkv: Drawing = lambda n, seed=0: draw(b, n, 3 * s.width, seed=seed)
    w: Drawing = lambda seed: draw.weight(s.head_dim, seed=seed)

    def angles(n: int) -> tuple[Tensor, Tensor]:
        angle = 6 * draw(1, n, s.head_dim // 2, dtype=torch.float32)
        return angle.cos(), angle.sin()

    def single(
        qkv: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
    ) -> tuple[Tensor, ...]:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
        return exact_rope(q, qw, cos, sin, eps), exact_rope(k, kw, cos, sin, eps), v.double()

    def joint(
        qkv: Sequence[Tensor], qw: Sequence[Tensor], kw: Sequence[Tensor], cos: Tensor, sin: Tensor, heads: int,
        eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        lengths = [x.shape[1] for x in qkv]
        parts = zip(qkv, qw, kw, cos.split(lengths, 1), sin.split(lengths, 1), strict=True)
        return tuple(torch.cat(t, 1) for t in zip(*(single(*p, heads, eps) for p in parts), strict=True))

    def grouped(
        qkv: Tensor, qw: Tensor | None, kw: Tensor | None, cos: Tensor, sin: Tensor, heads: int, kv_heads: int,
        eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
        return exact_rope_of_halves(q, qw, cos, sin, eps), exact_rope_of_halves(k, kw, cos, sin, eps), v.double()

    def of_groups() -> tuple[Any, ...]:
        return draw(b, s.text, 5 * s.width), w(1), w(2), *angles(s.text), 3 * s.heads, s.heads, EPS

    text = b * s.text * s.width * draw.item
    streams = lambda: ((qkv(s.image), qkv(s.text, 7)), (w(1), w(2)), (w(3), w(4)), *angles(s.tokens), s.heads, EPS)
    return [
        Case("qk_norm_rope", "qk_norm_rope", lambda: (qkv(s.tokens), w(1), w(2), *angles(s.tokens), s.heads, EPS),
             single, 4 * one + table, in_place=True),
        Case("joint_qk_norm_rope", "joint_qk_norm_rope", streams, joint, 6 * one + table),
        Case("grouped_qk_norm_rope", "grouped_qk_norm_rope", of_groups, grouped, 8 * text + s.text * s.head_dim * 4,
             in_place=True),
    ]  # fmt: skip


def _attentions(s: Sizes, draw: Draw, b: int) -> list[Case]:
    def qkv(n: int) -> tuple[Tensor, ...]:
        return draw(n, s.tokens, 3, s.heads, s.head_dim).unbind(2)

    def ragged() -> tuple[Tensor, ...]:
        return (*qkv(2), torch.tensor([s.tokens, s.image + max(s.text // 3, 1)], device=draw.device))

    one, flops = s.tokens * s.width * draw.item, 4 * s.tokens**2 * s.width
    exact = lambda *args: (exact_attention(*args),)
    short = s.image + max(s.text // 3, 1)
    return [
        Case("attention", "attention", lambda: qkv(b), exact, 4 * b * one, b * flops),
        Case("attention", "attention, ragged", ragged, exact, 8 * one, flops + 4 * s.tokens * short * s.width),
        Case("linear_attention", "linear_attention", lambda: qkv(b), lambda *args: (exact_linear_attention(*args),),
             4 * b * one, 4 * b * s.tokens * s.width * s.head_dim),
    ]  # fmt: skip


def _pointwise(s: Sizes, draw: Draw, b: int) -> list[Case]:
    hidden, latents, pixels = b * s.tokens * s.hidden, b * math.prod(s.latents), b * 3 * s.pixels**2

    return [
        Case("swiglu", "swiglu", lambda: (2 * draw(b, s.tokens, 2 * s.hidden),),
             lambda x: (exact_swiglu(x),), 3 * hidden * draw.item),
        Case("gelu_tanh", "gelu_tanh", lambda: (2 * draw(b, s.tokens, s.hidden),), lambda x: (exact_gelu(x),),
             2 * hidden * draw.item),
        Case("x0_project", "x0_project", lambda: (draw(b, *s.latents), draw(b, *s.latents, seed=3), 0.7),
             lambda x, f, t: (x.double() - t * f.double(),), 3 * latents * draw.item),
        Case("to_uint8", "to_uint8", lambda: (1.5 * draw(b, 3, s.pixels, s.pixels),), lambda x: (exact_bytes(x),),
             pixels * (draw.item + 1)),
    ]  # fmt: skip
