"""Attention backends on NVIDIA GPUs: what each one needs, and how to call it directly.

Each adapter has the signature of `ops.attention` without `lengths`: dense batches. torch's two are
called by their ATen names, so the choice between them is made here and not by torch's dispatcher on
every call, and no context manager runs on the hot path. cuDNN plans once per shape, which takes tens
to hundreds of milliseconds: `warm_up` runs the shapes to come before a user waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from .optional import absent
from .target import Target, no_gpu, off_gpu, other_dtype

Attention = Callable[..., Tensor]

other_than_half = other_dtype("takes bfloat16 or float16", torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """module, function: what is called (None: torch's own); archs: (least, first that is too new); head_dim:
    the largest; multiple: what head dims must be a multiple of."""

    name: str
    module: str | None = None
    function: str = "flash_attn_func"
    archs: tuple[int, int] = (80, 1000)
    head_dim: int = 256
    multiple: int = 8
    least: tuple[int, ...] = ()

    def load(self) -> Attention:
        """The backend as a function of q, k and v."""
        if self.module is None:
            return _torch({"cudnn": "cudnn", "torch-flash": "flash"}[self.name])
        return _package(self.module, self.function)

    def refuses(self, target: Target) -> str | None:
        """Why this backend cannot serve `target` on this machine, or None."""
        if reason := off_gpu(target) or other_than_half(target):
            return reason
        if target.arch is not None and not self.archs[0] <= target.arch < self.archs[1]:
            newest = "and newer" if self.archs[1] >= 1000 else f"to {(self.archs[1] - 1) / 10:.1f}"
            return f"needs compute capability {self.archs[0] / 10:.1f} {newest}, this GPU has {target.arch / 10:.1f}"
        if target.head_dim is not None and (target.head_dim > self.head_dim or target.head_dim % self.multiple):
            return f"takes head dims up to {self.head_dim}, multiples of {self.multiple}, not {target.head_dim}"
        if self.module is not None:
            return absent(self.module, self.least)
        if reason := no_gpu():
            return reason
        if self.name == "cudnn" and not torch.backends.cudnn.is_available():
            return "this torch has no cuDNN"
        if self.name == "torch-flash" and not torch.backends.cuda.is_flash_attention_available():
            return "this torch was built without flash attention"
        return None


def _torch(name: str) -> Attention:
    """One of torch's own; "cudnn" also takes a bias and whether the log-sum-exp is wanted."""
    op = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default
    more = (None, False) if name == "cudnn" else ()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = op(q, k, v, *more)[0]
        return out.transpose(1, 2).flatten(2)

    return attention


def _package(module: str, function: str) -> Attention:
    """function(q, k, v) of a package, whose versions return out or (out, log-sum-exp)."""
    call = getattr(import_module(module), function)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = call(q, k, v)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first.flatten(2)

    return attention


BACKENDS = {
    b.name: b
    for b in (
        Backend("cudnn", head_dim=128),
        Backend("torch-flash"),
        Backend("flash-attn-2", "flash_attn", least=(2, 7)),
        Backend("flash-attn-3", "flash_attn_interface", archs=(90, 100)),
        Backend("flash-attn-4", "flash_attn.cute", archs=(90, 120), head_dim=128),
        Backend("xformers", "xformers.ops", "memory_efficient_attention", least=(0, 0, 30)),
    )
}
PLANS_PER_SHAPE = ("cudnn",)


def order(arch: int | None) -> tuple[str, ...]:
    """Backends for compute capability `arch` (90 for 9.0; None: unknown), fastest first, by published figures.

    Hopper: FlashAttention 3 and cuDNN lead, near level; Blackwell: FlashAttention 4, then cuDNN; before
    Hopper FlashAttention 2, which torch ships as well. The project's own kernel (`triton`) comes after
    these until a measurement puts it ahead, and before xformers, whose kernel for these GPUs is
    FlashAttention's again or an older one.
    """
    names: tuple[str, ...]
    if arch is not None and arch >= 120:
        names = ("cudnn", "flash-attn-2", "torch-flash")
    elif arch is not None and arch >= 100:
        names = ("flash-attn-4", "cudnn", "flash-attn-2", "torch-flash")
    elif arch is not None and arch >= 90:
        names = ("flash-attn-3", "cudnn", "flash-attn-4", "flash-attn-2", "torch-flash")
    else:
        names = ("flash-attn-2", "torch-flash", "cudnn")
    return (*names, "triton", "xformers")


def warm_up(
    attention: Attention, shapes: Iterable[tuple[int, int, int, int, int]], dtype: torch.dtype,
    device: torch.device | str,
) -> int:  # fmt: skip
    """Runs `attention` once per distinct (batch, queries, keys, heads, head dim), so that what it plans or
    compiles per shape is ready; returns how many ran. Waits for none of them."""
    distinct, zeros = dict.fromkeys(shapes), partial(torch.zeros, dtype=dtype, device=device)
    for batch, queries, keys, heads, dim in distinct:
        # strides as in a network: q, k and v are views of one merged projection; of two, where queries look elsewhere
        if queries <= keys:
            q, k, v = zeros(batch, keys, 3, heads, dim).unbind(2)
        else:
            q, (k, v) = zeros(batch, queries, heads, dim), zeros(batch, keys, 2, heads, dim).unbind(2)
        attention(q[:, :queries], k, v)
    return len(distinct)
