"""Layers that several families share, under the names diffusers gives them.

Two streams of tokens (image and prompt) with weights of their own meet in one joint attention per
block: the block of SD3 (arXiv 2403.03206), also Qwen-Image's. With LN a LayerNorm without
parameters, a block does to each stream

    x <- x + gate * f(LN(x) * scale + shift)        f = joint attention, then a GELU MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import OpTable, into
from .containers import ModuleDict
from .linear import with_gelu

EPS = 1e-6  # of every norm
FREQUENCY_DIM = 256
MLP_RATIO = 4
ROWS = 6  # constants per stream and block

Stream = tuple[Tensor, Tensor]  # residual stream x, and x under the norm that reads it next
Readers = tuple[nn.Module | None, nn.Module | None]  # the layers that read an image's and a prompt's stream next

# merged tensor -> the checkpoint's names, row blocks in this order (within a block's prefix)
FUSED = {
    f"attn.{merged}.{leaf}": tuple(f"attn.{part}.{leaf}" for part in parts)
    for merged, parts in (
        ("to_qkv", ("to_q", "to_k", "to_v")),
        ("add_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
    )
    for leaf in ("weight", "bias")
}


class Constants(NamedTuple):
    """What conditioning does to one stream in one block, in order of use; None is the identity.

    Each [B or 1, 1, dim] float32. `scale` is the effective one: 1 + what the modulation gives.
    """

    shift_a: Tensor | None = None
    scale_a: Tensor | None = None
    gate_a: Tensor | None = None
    shift_f: Tensor | None = None
    scale_f: Tensor | None = None
    gate_f: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor) -> Constants:
        """Of rows [B, R, dim] in the order of the fields; those beyond R stay None."""
        return cls(*rows.unsqueeze(2).unbind(1))


PLAIN = Constants()


def linear32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32: what time gives is worth its bits."""
    return F.linear(x, layer.weight.float(), layer.bias.float())


def modulation_rows(layer: nn.Linear, temb: Tensor, scales: Sequence[int]) -> Tensor:
    """[B, dim] -> [B, R, dim] float32, R = out/in features; rows `scales` multiply, so get their 1."""
    rows = linear32(layer, F.silu(temb)).unflatten(-1, (-1, layer.in_features))
    one = torch.zeros(rows.shape[1], 1, device=rows.device)
    one[list(scales)] = 1
    return rows + one


def sinusoids(value: Tensor, scale: float = 1.0) -> Tensor:
    """[B] -> [B, 256] float32: cosines, then sines, of value * scale, frequencies 10000^(-i/128).

    Where the factor enters decides the rounding: phases reach 1000 rad, where float32 resolves 6e-5. It
    enters last, as in Qwen-Image; others scale `value` beforehand.
    """
    half = FREQUENCY_DIM // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=value.device).float() / half)
    angles = value.float()[:, None] * freqs * scale
    return torch.cat((angles.cos(), angles.sin()), -1)


class SinusoidEmbedder(nn.Module):
    """[B] -> [B, dim] float32: MLP over the sinusoids of a scalar."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(FREQUENCY_DIM, dim), nn.Linear(dim, dim)

    def forward(self, value: Tensor, scale: float = 1.0) -> Tensor:
        """Of value * scale (see `sinusoids`)."""
        return linear32(self.linear_2, F.silu(linear32(self.linear_1, sinusoids(value, scale))))


class JointAttention(nn.Module):
    """Projections of both streams; without `prompt_output` nothing follows for the prompt."""

    def __init__(self, heads: int, head_dim: int, prompt_output: bool) -> None:
        super().__init__()
        dim, self.heads = heads * head_dim, heads
        self.to_qkv, self.add_qkv = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps=EPS), nn.RMSNorm(head_dim, eps=EPS)
        self.norm_added_q = nn.RMSNorm(head_dim, eps=EPS)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        if prompt_output:
            self.to_add_out = nn.Linear(dim, dim)

    def forward(
        self, image: Tensor, prompt: Tensor, rope: tuple[Tensor, Tensor], lengths: Tensor | None,
        rows: int | None, ops: OpTable,
    ) -> Tensor:  # fmt: skip
        """What tokens image [B, S, dim] | prompt [B, L, dim] attend to; only the first `rows` rows."""
        q, k, v = ops.joint_qk_norm_rope(
            (self.to_qkv(image), self.add_qkv(prompt)),
            (self.norm_q.weight.float(), self.norm_added_q.weight.float()),
            (self.norm_k.weight.float(), self.norm_added_k.weight.float()),
            *rope, self.heads, EPS,
        )  # fmt: skip
        return ops.attention(q[:, :rows], k, v, lengths)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = MLP_RATIO * dim
        self.net: ModuleDict[Any] = ModuleDict(
            {"0": ModuleDict({"proj": nn.Linear(dim, hidden)}), "2": nn.Linear(hidden, dim)}
        )

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.net["2"](with_gelu(self.net["0"]["proj"], x, into(self.net["2"], ops)))


def add_branch(x: Tensor, branch: Tensor, gate: Tensor | None, ops: OpTable) -> Tensor:
    """x + gate * branch where no norm follows: one pass of the op beats four elementwise ones."""
    return ops.residual_layer_norm(x, branch, gate, None, None, EPS)[0]


def finish(
    x: Tensor, branch: Tensor, mlp: FeedForward, now: Constants, after: Constants, reader: nn.Module | None,
    ops: OpTable,
) -> Stream:  # fmt: skip
    """Adds attention's branch to x, then the MLP's, and opens the norm of `reader`, whose constants are `after`."""
    first = into(mlp.net["0"]["proj"], ops)
    x, h = first.residual_layer_norm(x, branch, now.gate_a, now.scale_f, now.shift_f, EPS)
    return into(reader, ops).residual_layer_norm(x, mlp(h, ops), now.gate_f, after.scale_a, after.shift_a, EPS)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2*W/2, 4C], features ordered (channel, row, column)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(x: Tensor, height: int, width: int) -> Tensor:
    """[B, height*width, 4C] -> [B, C, 2*height, 2*width], the inverse of `pack`."""
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (height, width)), 2)
