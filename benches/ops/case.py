"""One case of an op: its sizes, its inputs, the float64 arithmetic that its outputs are judged by.

The float64 functions share no code with the eager references.
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
    """What a network of one size works on. image, text: tokens; width = heads * head dim; hidden: of the MLP;
    latents: [C, H, W]; pixels: edge."""

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
    """One call of an op: op(*inputs()) is judged by exact(*inputs()), float64 tensors. bytes: the least it must
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


class Draw:
    """Draws normal tensors on the device; the same call gives the same values."""

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
    """Return the normed and rotated x, [B, S, H, D]. The rounding between the two is part of the op, so it is done."""
    x = exact_rms(x, weight, eps).to(x.dtype).double()
    turn = torch.complex(cos.double(), sin.double()).unsqueeze(-2)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def exact_rope_of_halves(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Return `exact_rope` of pairs (x[i], x[i + D/2]), x: [B, H, S, D]; without a weight, without the norm."""
    x = (x if weight is None else exact_rms(x, weight, eps).to(x.dtype)).double()
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(cos.double(), sin.double()).unsqueeze(1)
    return torch.cat((turned.real, turned.imag), -1)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, one sample and head at a time, so that full-size score matrices fit."""
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


def exact_swiglu(x: Tensor) -> Tensor:
    a, g = x.double().chunk(2, -1)
    return a / (1 + (-a).exp()) * g


def exact_bytes(image: Tensor) -> Tensor:
    return ((image.double() / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)


# -- judging ------------------------------------------------------------------------------------------------


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def judge(got: Any, eager: Any, exact: Sequence[Tensor]) -> str | None:
    """Return None where every output is right, otherwise what is wrong.

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
