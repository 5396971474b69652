"""Layers of the Qwen-Image network, under the checkpoint's names: two streams, one attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import OpTable

EPS = 1e-6  # of every norm
FREQUENCY_DIM = 256
TIME_SCALE = 1000.0
MLP_RATIO = 4
ROWS = 6  # constants per stream and block

Stream = tuple[Tensor, Tensor]  # residual stream x, and x under the norm that reads it next


class Constants(NamedTuple):
    """What time does to one stream in one block, in order of use; None is the identity.

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


class TimeEmbedding(nn.Module):
    """[B] -> [B, dim] float32: MLP over sinusoids of 1000 t, frequencies 10000^(-i/128), cosines first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(FREQUENCY_DIM, dim), "linear_2": nn.Linear(dim, dim)}
        )

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCY_DIM // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device).float() / half)
        # scaled last, as in the reference: phases reach 1000 rad, where float32 resolves 6e-5
        angles = t.float()[:, None] * freqs * TIME_SCALE
        first, second = self.timestep_embedder.values()
        sinusoids = torch.cat((angles.cos(), angles.sin()), -1)
        return linear32(second, F.silu(linear32(first, sinusoids)))


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
        self.net = nn.ModuleDict(
            {"0": nn.ModuleDict({"proj": nn.Linear(dim, hidden)}), "2": nn.Linear(hidden, dim)}
        )

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.net["2"](ops.gelu_tanh(self.net["0"]["proj"](x)))


class Block(nn.Module):
    """One block. steps: None builds the modulation layers, N > 0 tables of N rows, 0 neither.

    `prompt_output=False` leaves out what only a later block would read.
    """

    def __init__(self, heads: int, head_dim: int, steps: int | None, prompt_output: bool) -> None:
        super().__init__()
        dim = heads * head_dim
        self.attn = JointAttention(heads, head_dim, prompt_output)
        self.img_mlp = FeedForward(dim)
        if prompt_output:
            self.txt_mlp = FeedForward(dim)
        for stream in ("img", "txt"):
            if steps is None:
                layer = nn.Sequential(nn.SiLU(), nn.Linear(dim, ROWS * dim))
                setattr(self, f"{stream}_mod", layer)
            elif steps:
                self.register_buffer(f"{stream}_table", torch.empty(steps, ROWS, dim))

    def constants(self, stream: str, temb: Tensor) -> Tensor:
        """Rows of `Constants` for "img" or "txt", [B, 6, dim] float32."""
        return modulation_rows(getattr(self, f"{stream}_mod")[1], temb, scales=(1, 4))

    def forward(
        self, image: Stream, prompt: Stream, now: tuple[Constants, Constants],
        after: tuple[Constants, Constants | None], rope: tuple[Tensor, Tensor],
        lengths: Tensor | None, ops: OpTable,
    ) -> tuple[Stream, Stream | None]:  # fmt: skip
        """now: this block's constants of both streams; after: those of whoever reads its output,
        None for the prompt when nobody does. lengths: keys that count, of image then prompt."""
        n = image[0].shape[1]
        rows = n if after[1] is None else None
        out = self.attn(image[1], prompt[1], rope, lengths, rows, ops)
        image = _finish(image[0], self.attn.to_out[0](out[:, :n]), self.img_mlp, now[0], after[0], ops)
        if after[1] is None:
            return image, None
        branch = self.attn.to_add_out(out[:, n:])
        return image, _finish(prompt[0], branch, self.txt_mlp, now[1], after[1], ops)


def _finish(
    x: Tensor, branch: Tensor, mlp: FeedForward, now: Constants, after: Constants, ops: OpTable
) -> Stream:
    """Adds attention's branch to x, then the MLP's, and opens the next reader's norm."""
    x, h = ops.residual_layer_norm(x, branch, now.gate_a, now.scale_f, now.shift_f, EPS)
    return ops.residual_layer_norm(x, mlp(h, ops), now.gate_f, after.scale_a, after.shift_a, EPS)
