"""Every op at the sizes its networks run it: inputs, float64 arithmetic to judge by, bytes and FLOPs.

One table serves the GPU tests, the kernel benchmarks and the GPU kit, so that whatever is timed was
checked on the same inputs. The oracles share no code with the eager references.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Drawing = Callable[..., Tensor]

EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """image, text: tokens; width = heads * head dim; hidden: of the MLP; latents: [C, H, W]; pixels: edge."""

    image: int
    text: int
    heads: int
    head_dim: int
    hidden: int
    latents: tuple[int, int, int]
    pixels: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def linear_head_dim(self) -> int:
        """Linear attention is measured at the same heads."""
        return self.head_dim

    @property
    def tokens(self) -> int:
        return self.image + self.text


SIZES = {
    "tiny": Sizes(37, 5, 3, 32, 56, (4, 6, 10), 24),
    "z-image 256x256": Sizes(256, 128, 30, 128, 10240, (16, 32, 32), 256),
    "z-image 1024x1024": Sizes(4096, 128, 30, 128, 10240, (16, 128, 128), 1024),
    "qwen-image 1328x1328": Sizes(6889, 256, 24, 128, 12288, (16, 166, 166), 1328),
}


@dataclass(frozen=True)
class Case:
    """op(*inputs()) against exact(*inputs()), which returns float64 tensors. bytes: the least a call must
    read and write; flops: of its matrix products. in_place: the first argument is consumed. read: from
    what the op returns to what `exact` is compared with, for results in a code such as float8 and scales."""

    op: str
    name: str
    inputs: Callable[[], tuple[Any, ...]]
    exact: Callable[..., tuple[Tensor, ...]]
    bytes: int
    flops: int = 0
    in_place: bool = False
    read: Callable[[Any], Any] = lambda result: result


def cases(sizes: Sizes, dtype: torch.dtype, device: torch.device | str, batch: int = 1) -> list[Case]:
    """One case or more per op of the table; inputs are drawn in float32 and rounded to `dtype`."""
    from .layer_cases import decoding, products  # which builds on this module

    draw = _Draw(dtype, torch.device(device))
    kinds = (_norms, _ropes, _attentions, _pointwise, products, decoding)
    return [case for kind in kinds for case in kind(sizes, draw, batch)]


class _Draw:
    """Seeded normal tensors on the device; the same call gives the same values."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device, self.item = dtype, device, dtype.itemsize

    def __call__(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed + sum(shape))
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype or self.dtype)

    def weight(self, *shape: int, seed: int = 0) -> Tensor:
        return 1 + 0.3 * self(*shape, seed=seed, dtype=torch.float32)


# -- float64 arithmetic -------------------------------------------------------------------------------------


def exact_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def exact_layer(x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None) -> Tensor:
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


def exact_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x: [B, S, H, D]; the rounding between norm and rotation is part of the op, so it is done here too."""
    x = exact_rms(x, weight, eps).to(x.dtype).double()
    turn = torch.complex(cos.double(), sin.double()).unsqueeze(-2)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def exact_rope_of_halves(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """`exact_rope` of pairs (x[i], x[i + D/2]), x: [B, H, S, D]; without a weight, without the norm."""
    x = (x if weight is None else exact_rms(x, weight, eps).to(x.dtype)).double()
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(cos.double(), sin.double()).unsqueeze(1)
    return torch.cat((turned.real, turned.imag), -1)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """One sample and head at a time, so that full-size score matrices fit."""
    out = torch.empty(*q.shape, dtype=torch.float64, device=q.device)
    for b in range(q.shape[0]):
        n = k.shape[1] if lengths is None else int(lengths[b])
        for h in range(q.shape[2]):
            scores = q[b, :, h].double() @ k[b, :n, h].double().t() / math.sqrt(q.shape[3])
            out[b, :, h] = scores.softmax(-1) @ v[b, :n, h].double()
    return out.flatten(2)


def exact_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double() for x in (q.clamp(min=0), k.clamp(min=0), v))
    top = torch.einsum("bshd,bhde->bshe", q, torch.einsum("bshd,bshe->bhde", k, v))
    return (top / (torch.einsum("bshd,bhd->bsh", q, k.sum(1)) + 1e-15)[..., None]).flatten(2)


def exact_gelu(x: Tensor) -> Tensor:
    x = x.double()
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_bytes(image: Tensor) -> Tensor:
    return ((image.double() / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)


# -- cases --------------------------------------------------------------------------------------------------


def _norms(s: Sizes, draw: _Draw, b: int) -> list[Case]:
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


def _ropes(s: Sizes, draw: _Draw, b: int) -> list[Case]:
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


def _attentions(s: Sizes, draw: _Draw, b: int) -> list[Case]:
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


def _pointwise(s: Sizes, draw: _Draw, b: int) -> list[Case]:
    hidden, latents, pixels = b * s.tokens * s.hidden, b * math.prod(s.latents), b * 3 * s.pixels**2

    def swiglu(x: Tensor) -> tuple[Tensor]:
        a, g = x.double().chunk(2, -1)
        return (a / (1 + (-a).exp()) * g,)

    return [
        Case("swiglu", "swiglu", lambda: (2 * draw(b, s.tokens, 2 * s.hidden),), swiglu, 3 * hidden * draw.item),
        Case("gelu_tanh", "gelu_tanh", lambda: (2 * draw(b, s.tokens, s.hidden),), lambda x: (exact_gelu(x),),
             2 * hidden * draw.item),
        Case("x0_project", "x0_project", lambda: (draw(b, *s.latents), draw(b, *s.latents, seed=3), 0.7),
             lambda x, f, t: (x.double() - t * f.double(),), 3 * latents * draw.item),
        Case("to_uint8", "to_uint8", lambda: (1.5 * draw(b, 3, s.pixels, s.pixels),), lambda x: (exact_bytes(x),),
             pixels * (draw.item + 1)),
    ]  # fmt: skip


# -- judging ------------------------------------------------------------------------------------------------


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def judge(got: Any, eager: Any, exact: Sequence[Tensor]) -> str | None:
    """None where every output is right, otherwise what is wrong.

    The error rule: the largest error over all elements is at most twice the eager reference's in the
    same dtype, or one unit in the last place of the largest value. Bytes: within one rounding, 0.5.
    """
    got, eager = outputs(got), outputs(eager)
    if len(got) != len(eager):
        return f"{len(got)} outputs instead of {len(eager)}"
    for i, (y, reference, truth) in enumerate(zip(got, eager, exact, strict=True)):
        if (y.shape, y.dtype) != (reference.shape, reference.dtype):
            return f"output {i} is {y.dtype} {tuple(y.shape)}, not {reference.dtype} {tuple(reference.shape)}"
        worst: Callable[..., float] = lambda x, truth=truth: (x.double() - truth).abs().max().item()
        if not y.dtype.is_floating_point:
            allowed = 0.5 + 1e-4
        elif not y.isfinite().all():
            return f"output {i} holds values that are not finite"
        else:
            allowed = 2 * worst(reference) + torch.finfo(y.dtype).eps * truth.abs().max().item()
        if worst(y) > allowed:
            return f"output {i} is off by {worst(y):.3g}; allowed {allowed:.3g}"
    return None
