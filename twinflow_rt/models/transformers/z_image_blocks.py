"""Layers of the Z-Image network, under the checkpoint's names: one stream, norms on both sides of a branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...ops import OpTable, into
from ..layers import FREQUENCY_DIM, Module, linear32, sinusoids, with_swiglu

if TYPE_CHECKING:
    from .z_image import ZImageConfig

ADALN_DIM = 256  # the time embedding is min(dim, ADALN_DIM) wide
TIME_HIDDEN = 1024
QK_NORM_EPS = 1e-5

# a block's norms in the order they act
BLOCK_NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")


class TimestepEmbedder(nn.Module):
    """[B] -> [B, out_dim] float32: MLP over the sinusoids of a scalar."""

    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_DIM, TIME_HIDDEN), nn.SiLU(), nn.Linear(TIME_HIDDEN, out_dim)
        )

    def forward(self, t: Tensor) -> Tensor:
        x = sinusoids(t)
        for layer in self.mlp:  # float32 throughout: these constants are worth their bits
            x = linear32(layer, x) if isinstance(layer, nn.Linear) else layer(x)
        return x


class Attention(Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // heads, eps=QK_NORM_EPS)
        self.norm_k = nn.RMSNorm(dim // heads, eps=QK_NORM_EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: Tensor | None, rows: int | None, ops: OpTable
    ) -> Tensor:
        q, k, v = ops.qk_norm_rope(
            self.to_qkv(x), self.norm_q.weight.float(), self.norm_k.weight.float(), *rope,
            self.heads, QK_NORM_EPS,
        )  # fmt: skip
        return self.to_out[0](ops.attention(q if rows is None else q[:, :rows], k, v, lengths))


class FeedForward(Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.w2(with_swiglu(self.w13, x, into(self.w2, ops)))


class Block(Module):
    """One sandwich-norm block; `steps` = N holds N rows of folded norm weights instead of what makes them."""

    norm_table: Tensor

    def __init__(self, config: ZImageConfig, modulated: bool, steps: int | None) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.norm_eps
        self.attention = Attention(dim, config.n_heads)
        self.feed_forward = FeedForward(dim, config.hidden)
        if steps is not None:
            self.register_buffer("norm_table", torch.empty(steps if modulated else 1, 4, dim))
            return
        for name in BLOCK_NORMS:
            setattr(self, name, nn.RMSNorm(dim, eps=config.norm_eps))
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.Linear(min(dim, ADALN_DIM), 4 * dim))

    def norm_weights(self, temb: Tensor | None = None) -> Tensor:
        """Effective norm weights [B or 1, 4, dim], float32, in the order they are used."""
        weights = torch.stack([getattr(self, name).weight.float() for name in BLOCK_NORMS])[None]
        if temb is None:
            return weights
        layer: Any = self.adaLN_modulation[0]
        scale_a, gate_a, scale_f, gate_f = linear32(layer, temb).chunk(4, -1)
        return weights * torch.stack((1 + scale_a, gate_a.tanh(), 1 + scale_f, gate_f.tanh()), 1)

    def forward(
        self, x: Tensor, h: Tensor, norms: Sequence[Tensor], next_pre: Tensor | None, rope: tuple[Tensor, Tensor],
        lengths: Tensor | None, ops: OpTable, rows: int | None = None, reader: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x: residual stream; h: x under this block's first norm; norms: its four weights, [B or 1, 1, dim] each.
        Returns the first two for `reader`, the first layer of the next block. `rows` keeps only the first rows of the
        output: where nothing reads the others."""
        _, post_a, pre_f, post_f = norms
        branch = self.attention(h, rope, lengths, rows, ops)
        x, feed_forward = x if rows is None else x[:, :rows], self.feed_forward
        x, h = into(feed_forward.w13, ops).residual_norm(x, branch, post_a, pre_f, self.eps)
        return into(reader, ops).residual_norm(x, feed_forward(h, ops), post_f, next_pre, self.eps)


class FinalLayer(nn.Module):
    def __init__(self, config: ZImageConfig, folded: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, 4 * config.in_channels)
        if not folded:
            width = min(config.dim, ADALN_DIM)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, config.dim))
