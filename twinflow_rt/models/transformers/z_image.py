"""Z-Image velocity network with TwinFlow's second time embedder (diffusers: ZImageTransformer2DModel).

A single-stream transformer: image tokens pass two modulated refiner blocks, prompt tokens two
unmodulated ones, then both share `layers`. Every block is a sandwich of RMSNorms,

    x <- x + tanh(gate) * rms(f(rms(x) * (1 + scale)))        f = attention, then SwiGLU,

and since scale and gate only ever multiply norm weights, a block needs nothing of the timestep but
four *effective norm weights*. `modulate` computes them from (t, tt); the fold pass stores them as a
table and drops everything that made them. One forward serves both.

TwinFlow's time: temb = e1(|s| * 1000) + |s - s2| * e2((s2 - s) * 1000), s = sign(t) (1 - |t|) and s2
likewise of tt. As sign(0) = 0, (t, tt) = (1, 0) gives s = s2 = 0: at one evaluation e2 vanishes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ...ops import OpTable, ops_for
from ...ops.tracing import TableCache
from ..config import NetworkConfig, second_embedder
from ..context import Context as PromptContext
from ..context import host_lengths
from ..folding import Resident
from ..layers import (
    FREQUENCY_DIM,
    Module,
    ModuleDict,
    ModuleList,
    channels_last,
    linear32,
    signed,
    sinusoids,
    time_sign,
    with_swiglu,
)
from ..token_split import WHOLE, TokenSplit
from ..velocity_network import VelocityNetwork

ADALN_DIM = 256  # the time embedding is min(dim, ADALN_DIM) wide
TIME_HIDDEN = 1024
QK_NORM_EPS = 1e-5

# a block's norms in the order they act
BLOCK_NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
SEQ_MULTIPLE = 32  # image and prompt sequences are each padded to multiples of this, with learned tokens
FINAL_NORM_EPS = 1e-6

# merged weight -> the checkpoint's names, row blocks in this order (within a block's prefix)
FUSED = {
    "attention.to_qkv.weight": ("attention.to_q.weight", "attention.to_k.weight", "attention.to_v.weight",),
    "feed_forward.w13.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
}  # fmt: skip


def pad_length(n: int) -> int:
    """Return n rounded up to `SEQ_MULTIPLE`."""
    return -(-n // SEQ_MULTIPLE) * SEQ_MULTIPLE


@dataclass(frozen=True)
class ZImageConfig(NetworkConfig):
    """transformer/config.json, field for field; defaults are the 6B release."""

    class_name = "ZImageTransformer2DModel"

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or sum(self.axes_dims) != self.dim // self.n_heads:
            raise ConfigError(
                f"axes_dims {self.axes_dims} must add up to dim / n_heads = {self.dim}/{self.n_heads}; "
                "check transformer/config.json"
            )
        if len(self.axes_lens) != 3 or min(self.axes_lens) < 1 or self.axes_lens[0] < SEQ_MULTIPLE + 2:
            raise ConfigError(
                f"axes_lens {self.axes_lens} must be three counts of positions, the first at least {SEQ_MULTIPLE + 2}; "
                "check transformer/config.json"
            )
        if self.n_kv_heads != self.n_heads or not self.qk_norm:
            raise ConfigError("Z-Image needs n_kv_heads == n_heads and qk_norm; this config is another family's")
        if self.all_patch_size != (2,) or self.all_f_patch_size != (1,):
            raise ConfigError(
                f"patch sizes {self.all_patch_size}/{self.all_f_patch_size} are not supported; released "
                "Z-Image models have (2,)/(1,)"
            )

    @property
    def hidden(self) -> int:
        """Width of the SwiGLU."""
        return int(self.dim / 3 * 8)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


class TimestepEmbedder(nn.Module):
    """An MLP over the sinusoids of a scalar: [B] -> [B, out_dim] float32."""

    def __init__(self, out_dim: int, sign: nn.Linear | None = None) -> None:
        super().__init__()
        self.time_sign_embed = sign
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_DIM, TIME_HIDDEN), nn.SiLU(), nn.Linear(TIME_HIDDEN, out_dim)
        )

    def forward(self, t: Tensor) -> Tensor:
        x = sinusoids(t)
        for layer in self.mlp:  # float32 throughout: these constants are worth their bits
            x = linear32(layer, x) if isinstance(layer, nn.Linear) else layer(x)
        return signed(x, self.time_sign_embed)


class Attention(Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // heads, eps=QK_NORM_EPS)
        self.norm_k = nn.RMSNorm(dim // heads, eps=QK_NORM_EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: Tensor | None, queries: int | None, ops: OpTable
    ) -> Tensor:
        q, k, v = ops.qk_norm_rope(
            self.to_qkv(x), self.norm_q.weight.float(), self.norm_k.weight.float(), *rope,
            self.heads, QK_NORM_EPS,
        )  # fmt: skip
        return self.to_out[0](ops.attention(q if queries is None else q[:, :queries], k, v, lengths))


class FeedForward(Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.w2(with_swiglu(self.w13, x, ops_for(self.w2, ops)))


class Block(Module):
    """One sandwich-norm block. steps: N holds a table of N rows of folded norm weights instead of what makes them."""

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
        """Return the effective norm weights [B or 1, 4, dim] float32, in the order they are used."""
        weights = torch.stack([getattr(self, name).weight.float() for name in BLOCK_NORMS])[None]
        if temb is None:
            return weights
        layer: Any = self.adaLN_modulation[0]
        scale_a, gate_a, scale_f, gate_f = linear32(layer, temb).chunk(4, -1)
        return weights * torch.stack((1 + scale_a, gate_a.tanh(), 1 + scale_f, gate_f.tanh()), 1)

    def forward(
        self, x: Tensor, h: Tensor, norms: Sequence[Tensor], next_pre: Tensor | None, rope: tuple[Tensor, Tensor],
        lengths: Tensor | None, ops: OpTable, queries: int | None = None, reader: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return the residual stream x, and x under the norm (of weight `next_pre`) of `reader`, the first layer of the
        next block.

        h: x under this block's first norm. norms: its four weights, [B or 1, 1, dim] each. queries: compute the first
        tokens alone, where nothing reads the others.
        """
        _, post_a, pre_f, post_f = norms
        branch = self.attention(h, rope, lengths, queries, ops)
        x, feed_forward = x if queries is None else x[:, :queries], self.feed_forward
        x, h = ops_for(feed_forward.w13, ops).residual_norm(x, branch, post_a, pre_f, self.eps)
        return ops_for(reader, ops).residual_norm(x, feed_forward(h, ops), post_f, next_pre, self.eps)


class FinalLayer(nn.Module):
    def __init__(self, config: ZImageConfig, folded: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, 4 * config.in_channels)
        if not folded:
            width = min(config.dim, ADALN_DIM)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, config.dim))


@dataclass(frozen=True)
class Modulation:
    """Effective norm weights of every modulated block ([B or 1, 4, dim] float32: attention pre and
    post, feed-forward pre and post) and of the final LayerNorm ([B or 1, dim])."""

    blocks: tuple[Tensor, ...]
    final: Tensor


@dataclass(frozen=True)
class Context(PromptContext):
    """ragged: the padded lengths as int64 [B] on the device where they differ, else None: no mask is needed."""

    ragged: Tensor | None = None


class ZImageTransformer(VelocityNetwork):
    """F(x_t, t, tt, prompt), the velocity z - x of TwinFlow (diffusers' network predicts its negative).

    folded_steps=N builds the compiled layout: no time embedders, no modulation, no norm weights, but tables of N rows
    of effective norm weights (buffers `norm_table`, float32).
    """

    second_embedder = "t_embedder_2"
    unguided = 0.0
    prompt_modules = ("cap_embedder", "context_refiner")
    prompt_multiple = SEQ_MULTIPLE
    norm_table: Tensor

    def __init__(self, config: ZImageConfig, *, folded_steps: int | None = None) -> None:
        super().__init__(config, folded_steps)
        self.sequence: TokenSplit = WHOLE
        dim = config.dim
        self.all_x_embedder = ModuleDict({"2-1": nn.Linear(4 * config.in_channels, dim)})
        self.all_final_layer = ModuleDict({"2-1": FinalLayer(config, folded_steps is not None)})
        self.cap_embedder = nn.Sequential(
            nn.RMSNorm(config.cap_feat_dim, eps=config.norm_eps), nn.Linear(config.cap_feat_dim, dim)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, dim))

        def stack(depth: int, modulated: bool) -> ModuleList[Block]:
            return ModuleList(Block(config, modulated, folded_steps) for _ in range(depth))

        self.noise_refiner = stack(config.n_refiner_layers, True)
        self.context_refiner = stack(config.n_refiner_layers, False)
        self.layers = stack(config.n_layers, True)
        if folded_steps is not None:
            self.register_buffer("norm_table", torch.empty(folded_steps, dim))
        else:
            self.t_embedder = TimestepEmbedder(min(dim, ADALN_DIM), time_sign(config, min(dim, ADALN_DIM)))
            if config.twinflow:
                self.t_embedder_2 = TimestepEmbedder(min(dim, ADALN_DIM))
        self._rope_tables: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        self._ropes = TableCache()

    # -- time -----------------------------------------------------------------------------------

    def embed_time(self, t: Tensor, tt: Tensor) -> Tensor:
        """Return temb [B, min(dim, 256)] float32 of t, tt [B] (see the module's docstring), in float64 up to the
        embedders, as upstream."""
        t, target = self.times(t, tt)
        s, scale = t.sign() * (1 - t.abs()), self.config.t_scale
        first: Tensor = self.t_embedder(s.abs() * scale)
        if target is None:
            return first
        s2 = target.sign() * (1 - target.abs())
        return first + (s - s2).abs().float()[:, None] * self.t_embedder_2((s2 - s) * scale)

    def modulate(self, t: Tensor, tt: Tensor) -> Modulation:
        """Return the constants at times t, tt ([B], in [-1, 1])."""
        temb = self.embed_time(t, tt)
        blocks = (*self.noise_refiner, *self.layers)
        return Modulation(tuple(b.norm_weights(temb) for b in blocks), self._final_weight(temb))

    def _final_weight(self, temb: Tensor) -> Tensor:
        layer: Any = self.all_final_layer["2-1"].adaLN_modulation[1]
        return 1 + linear32(layer, F.silu(temb))

    def fold(self, t: Tensor, tt: Tensor, resident: Resident) -> Iterator[tuple[str, Tensor]]:
        with resident("t_embedder", "t_embedder_2"):
            temb = self.embed_time(t, tt)
        for stack, modulated in (("noise_refiner", True), ("context_refiner", False), ("layers", True)):
            for i, block in enumerate(getattr(self, stack)):
                parts = [f"{stack}.{i}.{n}" for n in BLOCK_NORMS + ("adaLN_modulation",) * modulated]
                with resident(*parts):
                    yield f"{stack}.{i}.norm_table", block.norm_weights(temb if modulated else None)
        with resident("all_final_layer.2-1.adaLN_modulation"):
            yield "norm_table", self._final_weight(temb)

    def step_modulation(self, step: int) -> Modulation:
        blocks = (*self.noise_refiner, *self.layers)
        tables, final = tuple(b.norm_table for b in blocks), self.norm_table
        if self.folded_steps == 1:
            return Modulation(tables, final)
        return Modulation(tuple(table[step : step + 1] for table in tables), final[step : step + 1])

    # -- positions ------------------------------------------------------------------------------

    def _rope(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos, sin [B, S, head_dim/2] float32 of positions ids [B, S, 3]. Angles are formed in float64 and
        rounded to float32 before the cosine, as in the reference."""
        if ids.device not in self._rope_tables:
            tables = []
            for dim, length in zip(self.config.axes_dims, self.config.axes_lens, strict=True):
                freqs = self.config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
                angles = torch.outer(torch.arange(length, dtype=torch.float64), freqs).float()
                tables.append((angles.cos().to(ids.device), angles.sin().to(ids.device)))
            self._rope_tables[ids.device] = tables
        axes = [(cos[ids[..., i]], sin[ids[..., i]]) for i, (cos, sin) in enumerate(self._rope_tables[ids.device])]
        return torch.cat([c for c, _ in axes], -1), torch.cat([s for _, s in axes], -1)

    def _context_rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        def make() -> tuple[Tensor, Tensor]:
            ids = torch.zeros(1, length, 3, dtype=torch.int64, device=device)
            ids[0, :, 0] = torch.arange(1, length + 1, device=device)
            return self._rope(ids)

        return self._ropes(length, device, make)

    def _image_rope(self, height: int, width: int, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos, sin of the image's tokens, which sit one past the padded prompt on axis 0; padding sits at the
        origin."""
        n, device = height * width, offsets.device
        ids = torch.zeros(offsets.shape[0], pad_length(n), 3, dtype=torch.int64, device=device)
        rows = torch.arange(height, device=device).repeat_interleave(width)
        ids[:, :n, 0] = offsets[:, None] + 1
        ids[:, :n, 1] = rows
        ids[:, :n, 2] = torch.arange(width, device=device).repeat(height)
        return self._rope(ids)

    # -- network --------------------------------------------------------------------------------

    def encode_context(self, prompt_embeds: Tensor, lengths: Sequence[int] | Tensor) -> Context:
        """Return the prompts after `cap_embedder` and `context_refiner`.

        Tokens up to the next multiple of 32 become the learned pad token, which attends like any other (as in the
        reference), so the context's lengths are such multiples. Where lengths are on the device, L must be one, too.
        """
        device, ragged = prompt_embeds.device, None
        counts, rows, masked = host_lengths(prompt_embeds, lengths)
        padded = tuple(pad_length(n) for n in counts)
        longest = max(padded, default=rows)
        if masked is not None and (not padded or min(padded) != longest):
            ragged = (masked + SEQ_MULTIPLE - 1) // SEQ_MULTIPLE * SEQ_MULTIPLE
        norm, linear = self.cap_embedder
        x = linear(self.ops.rms_norm(prompt_embeds[:, :rows], norm.weight.float(), norm.eps))
        pad = self.cap_pad_token.to(x.dtype)
        if longest > rows:
            x = torch.cat((x, pad.expand(len(x), longest - rows, -1)), 1)
        if masked is not None:
            x = torch.where((torch.arange(longest, device=device) < masked[:, None])[..., None], x, pad)
        norms = [b.norm_weights() if self.folded_steps is None else b.norm_table for b in self.context_refiner]
        x = self._run(self.context_refiner, norms, x, self._context_rope(longest, device), ragged)
        return Context(x, padded, ragged)

    def patches(self, latents: Tensor, modulation: Modulation, context: Context) -> tuple[Tensor, float]:
        x = self._patchify(latents)
        n, device, longest = x.shape[1], x.device, context.tokens.shape[1]
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        offsets = torch.full((len(x),), longest, device=device) if context.ragged is None else context.ragged
        make = partial(self._image_rope, height, width, offsets)
        rope = make() if context.ragged is not None else self._ropes((len(x), height, width, longest), device, make)
        x = self.all_x_embedder["2-1"](x)
        split, padded = self.sequence, rope[0].shape[1]
        pad = self.x_pad_token.to(x.dtype).expand(x.shape[0], padded - n, -1)
        x = split.share(torch.cat((x, pad), 1), padded)

        refiners, own = len(self.noise_refiner), x.shape[1]
        shares = split.share(rope[0], padded), split.share(rope[1], padded)
        x = self._run(self.noise_refiner, modulation.blocks[:refiners], x, shares, split.keys(None, padded))
        lengths = None if context.ragged is None else context.ragged + padded
        text_rope = self._context_rope(longest, device)
        cos, sin = (
            split.share(torch.cat((image, text.expand(image.shape[0], -1, -1)), 1), padded, longest)
            for image, text in zip(rope, text_rope, strict=True)
        )
        x = torch.cat((x, split.share(context.tokens.to(x.dtype), longest)), 1)
        keys = split.keys(lengths, padded, longest)
        x = self._run(self.layers, modulation.blocks[refiners:], x, (cos, sin), keys, queries=min(n, own))
        x = self.all_final_layer["2-1"].linear(self.ops.layer_norm(x, modulation.final[:, None], FINAL_NORM_EPS))
        return channels_last(split.whole(x, n), height, width, 2), -1.0

    def _run(
        self, blocks: ModuleList[Block], norms: Sequence[Tensor], x: Tensor, rope: tuple[Tensor, Tensor],
        lengths: Tensor | None, queries: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Return x [B, S, dim] after the blocks of one stack. queries: of the last, compute the first tokens alone."""
        if not len(blocks):
            return x
        *others, last = blocks
        each = [weights.unsqueeze(2).unbind(1) for weights in norms]
        readers = [block.attention.to_qkv for block in blocks]
        h = ops_for(readers[0], self.ops).rms_norm(x, each[0][0], self.config.norm_eps)
        for i, block in enumerate(others):
            x, h = block(x, h, each[i], each[i + 1][0], rope, lengths, self.ops, reader=readers[i + 1])
        y: Tensor = last(x, h, each[-1], None, rope, lengths, self.ops, queries)[0]
        return y

    def _patchify(self, latents: Tensor) -> Tensor:
        """Return latents [B, C, H, W] as tokens [B, H/2*W/2, 4C], features ordered (row, column, channel)."""
        b, c, h, w = latents.shape
        x = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(b, (h // 2) * (w // 2), 4 * c)


LAYOUT = Layout(
    FUSED, (), float32_where("norm_q.weight", "norm_k.weight", "cap_embedder.0.weight"),
    second_embedder(ZImageTransformer.second_embedder, "Z-Image"),
)  # fmt: skip
