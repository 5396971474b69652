"""Layers of the SANA network, under the checkpoint's names: linear attention, cross attention, Mix-FFN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import OpTable, into
from ..layers import EPS, ROWS, Constants, MixFeedForward, SinusoidEmbedder, Stream, add_branch, linear32

QK_EPS = 1e-5


class TimeModulation(nn.Module):
    """Time -> (constants that all blocks share [B, 6, dim], conditioning of the closing norm [B, dim]).

    One embedder of the adaLN-single scheme; `guided`: with one of the guidance scale beside it
    (SANA-Sprint), whose names in the checkpoint differ too.
    """

    def __init__(self, dim: int, guided: bool) -> None:
        super().__init__()
        self.guided = guided
        if guided:
            self.timestep_embedder, self.guidance_embedder = SinusoidEmbedder(dim), SinusoidEmbedder(dim)
        else:
            self.emb = nn.ModuleDict({"timestep_embedder": SinusoidEmbedder(dim)})
        self.linear = nn.Linear(dim, ROWS * dim)

    def forward(self, time: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """time: [B] as the embedder takes it; guidance: [B or 1], where `guided`."""
        if self.guided:
            condition = self.timestep_embedder(time) + self.guidance_embedder(guidance)
        else:
            condition = self.emb["timestep_embedder"](time)
        return linear32(self.linear, F.silu(condition)).unflatten(-1, (ROWS, -1)), condition


class LinearAttention(nn.Module):
    """Image tokens among themselves. normed: RMSNorm of whole query and key rows. bias: of the input
    projection, which only absorbed constants give it."""

    def __init__(self, dim: int, heads: int, normed: bool, bias: bool) -> None:
        super().__init__()
        self.heads, self.normed = heads, normed
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=bias)
        if normed:
            self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=QK_EPS), nn.RMSNorm(dim, eps=QK_EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        q, k, v = self.to_qkv(x).chunk(3, -1)
        if self.normed:
            q = ops.rms_norm(q, self.norm_q.weight.float(), QK_EPS)
            k = ops.rms_norm(k, self.norm_k.weight.float(), QK_EPS)
        return self.to_out[0](ops.linear_attention(*(y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))))


class CrossAttention(nn.Module):
    """Image tokens to prompt tokens, whose keys and values depend on the prompt alone."""

    def __init__(self, dim: int, heads: int, head_dim: int, normed: bool) -> None:
        super().__init__()
        inner, self.heads, self.normed = heads * head_dim, heads, normed
        self.to_q, self.to_kv = nn.Linear(dim, inner), nn.Linear(dim, 2 * inner)
        if normed:
            self.norm_q, self.norm_k = nn.RMSNorm(inner, eps=QK_EPS), nn.RMSNorm(inner, eps=QK_EPS)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def keys_values(self, prompt: Tensor, ops: OpTable) -> Tensor:
        """Of prompt tokens [B, L, dim]: [B, L, 2, heads, head_dim]."""
        k, v = self.to_kv(prompt).chunk(2, -1)
        if self.normed:
            k = ops.rms_norm(k, self.norm_k.weight.float(), QK_EPS)
        return torch.stack((k, v), 2).unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, keys_values: Tensor, lengths: Tensor | None, ops: OpTable) -> Tensor:
        q, (k, v) = self.to_q(x), keys_values.unbind(2)
        if self.normed:
            q = ops.rms_norm(q, self.norm_q.weight.float(), QK_EPS)
        return self.to_out[0](ops.attention(q.unflatten(-1, (self.heads, -1)), k, v, lengths))


class Block(nn.Module):
    """One block. steps: None has the table that the shared constants are added to, N > 0 a table of N
    rows of their sum, 0 neither (the constants are inside the weights)."""

    table: Tensor

    def __init__(
        self, dim: int, heads: int, cross: tuple[int, int], hidden: int, normed: bool, steps: int | None
    ) -> None:
        super().__init__()
        self.attn1 = LinearAttention(dim, heads, normed, bias=steps == 0)
        self.attn2 = CrossAttention(dim, *cross, normed)
        self.ff = MixFeedForward(dim, hidden)
        if steps is None:
            self.scale_shift_table = nn.Parameter(torch.empty(ROWS, dim))
        elif steps:
            self.register_buffer("table", torch.empty(steps, ROWS, dim))

    def constants(self, shared: Tensor) -> Tensor:
        """Rows of `Constants` [B, 6, dim] float32, from those all blocks share."""
        return effective(self.scale_shift_table, shared, scales=(1, 4))

    def forward(
        self, image: Stream, keys_values: Tensor, lengths: Tensor | None, now: Constants, after: Constants,
        height: int, ops: OpTable, reader: nn.Module | None = None,
    ) -> Stream:  # fmt: skip
        """now: this block's constants; after: those of `reader`, the layer that reads its output."""
        x = add_branch(image[0], self.attn1(image[1], ops), now.gate_a, ops)
        branch = self.attn2(x, keys_values, lengths, ops)
        x, h = ops.residual_layer_norm(x, branch, None, now.scale_f, now.shift_f, EPS)
        branch = self.ff(h.unflatten(1, (height, -1))).flatten(1, 2)
        return into(reader, ops).residual_layer_norm(x, branch, now.gate_f, after.scale_a, after.shift_a, EPS)


def effective(table: Tensor, shared: Tensor, scales: tuple[int, ...]) -> Tensor:
    """table [R, dim] + shared [B, R or 1, dim], float32; rows `scales` multiply, so get their 1."""
    one = torch.zeros(len(table), 1, device=table.device)
    one[list(scales)] = 1
    return table.float() + shared + one
