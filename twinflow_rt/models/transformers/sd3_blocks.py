"""Layers of the SD3.5 network, under the checkpoint's names: MMDiT, some blocks with a second attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import OpTable, into
from ..layers import (
    EPS,
    Constants,
    FeedForward,
    JointAttention,
    ModuleDict,
    Readers,
    SinusoidEmbedder,
    Stream,
    add_branch,
    finish,
    linear32,
    modulation_rows,
)

Rope = tuple[Tensor, Tensor]


class TextEmbedder(nn.Module):
    """Pooled prompt [B, P] -> [B, dim] float32."""

    def __init__(self, pooled_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(pooled_dim, dim), nn.Linear(dim, dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return linear32(self.linear_2, F.silu(linear32(self.linear_1, pooled.float())))


class TimeTextEmbedding(nn.Module):
    """One embedder of time and pooled prompt; the sum of its two parts conditions the network.

    `timed=False` leaves out the time's part: a folded network has its values instead.
    """

    def __init__(self, pooled_dim: int, dim: int, timed: bool) -> None:
        super().__init__()
        self.text_embedder = TextEmbedder(pooled_dim, dim)
        if timed:
            self.timestep_embedder = SinusoidEmbedder(dim)


class SelfAttention(nn.Module):
    """Image tokens among themselves."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        dim, self.heads = heads * head_dim, heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps=EPS), nn.RMSNorm(head_dim, eps=EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, rope: Rope, ops: OpTable) -> Tensor:
        q, k, v = ops.qk_norm_rope(
            self.to_qkv(x), self.norm_q.weight.float(), self.norm_k.weight.float(), *rope, self.heads, EPS
        )
        return self.to_out[0](ops.attention(q, k, v))


class Modulation(NamedTuple):
    """Constants of one block: of both streams, and (shift, scale, gate) of the second attention if it has one."""

    image: Constants
    prompt: Constants
    second: Constants | None = None


class Block(nn.Module):
    """One block. dual: with a second attention, of image tokens alone, that reads the same norm under
    a modulation of its own. `prompt_output=False`: nothing after attention for the prompt."""

    def __init__(self, heads: int, head_dim: int, dual: bool, prompt_output: bool) -> None:
        super().__init__()
        dim = heads * head_dim
        self.dual, self.prompt_output = dual, prompt_output
        self.rows = (9 if dual else 6) + (6 if prompt_output else 2)
        self.norm1 = ModuleDict({"linear": nn.Linear(dim, (9 if dual else 6) * dim)})
        self.norm1_context = ModuleDict({"linear": nn.Linear(dim, (6 if prompt_output else 2) * dim)})
        self.attn = JointAttention(heads, head_dim, prompt_output)
        self.ff = FeedForward(dim)
        if dual:
            self.attn2 = SelfAttention(heads, head_dim)
        if prompt_output:
            self.ff_context = FeedForward(dim)

    def constants(self, temb: Tensor) -> Tensor:
        """[B, dim] -> [B, `rows`, dim] float32: the rows of `read`."""
        image = modulation_rows(self.norm1["linear"], temb, (1, 4, 7) if self.dual else (1, 4))
        if self.prompt_output:
            return torch.cat((image, modulation_rows(self.norm1_context["linear"], temb, (1, 4))), 1)
        # the closing block has the prompt's scale before its shift
        return torch.cat((image, modulation_rows(self.norm1_context["linear"], temb, (0,)).flip(1)), 1)

    def read(self, rows: Tensor) -> Modulation:
        """The modulation that `rows` [B or 1, R, dim] hold: image (6), its second attention (3), prompt."""
        first, rest = rows[:, :6], rows[:, 6:]
        if not self.dual:
            return Modulation(Constants.of(first), Constants.of(rest))
        return Modulation(Constants.of(first), Constants.of(rest[:, 3:]), Constants.of(rest[:, :3]))

    def forward(
        self, image: Stream, prompt: Stream, now: Modulation, after: tuple[Constants, Constants | None],
        rope: tuple[Rope, Rope], ops: OpTable, readers: Readers = (None, None),
    ) -> tuple[Stream, Stream | None]:  # fmt: skip
        """after: first constants of `readers`, the layers that read the output. rope: of the joint sequence, of the
        image's."""
        (x, h), n, own = image, image[0].shape[1], now.image
        out = self.attn(h, prompt[1], rope[0], None, None if self.prompt_output else n, ops)
        branch = self.attn.to_out[0](out[:, :n])
        if now.second is not None:
            h = into(self.attn2.to_qkv, ops).layer_norm(x, now.second.scale_a, EPS, now.second.shift_a)
            x = add_branch(x, branch, own.gate_a, ops)
            branch, own = self.attn2(h, rope[1], ops), own._replace(gate_a=now.second.gate_a)
        image = finish(x, branch, self.ff, own, after[0], readers[0], ops)
        if after[1] is None:
            return image, None
        branch = self.attn.to_add_out(out[:, n:])
        return image, finish(prompt[0], branch, self.ff_context, now.prompt, after[1], readers[1], ops)
