"""SANA velocity network with TwinFlow's second time embedder (diffusers: SanaTransformer2DModel).

Every block does to the image tokens x, with LN a LayerNorm without parameters,

    x <- x + gate * linear_attention(LN(x) * scale + shift)
    x <- x + cross_attention(x, prompt)
    x <- x + gate * mix_ffn(LN(x) * scale + shift)

adaLN-single: the constants are one set that time gives to all blocks plus a learned table of each
block's own. They are held in one of three ways: made from (t, tt) by `modulate`; `folded_steps=N`:
as tables of N rows; `folded_steps=1, absorbed=True`: inside the linear layers next to them. Keys and
values of cross attention depend on the prompt alone: `encode_context` makes them, once per prompt.

TwinFlow's time (its OpenUni model), m and e being what `time_embed` gives blocks and closing norm:

    (m, e) = (m1, e1)(1000 t) + (t - tt) * (m2, e2)(1000 tt)

The output is the velocity z - x itself.

SANA-Sprint (`guidance_embeds`) has no second embedder but one of the guidance scale. Its TrigFlow state cos(s) x +
sin(s) z is the linear (1-t) x + t z at t = sin(s) / (sin(s) + cos(s)), but for the factor 1 / (sin(s) + cos(s)), and so
is its published sampler: the network is a velocity of that linear flow, x = x_t - t F, embeds t itself (not 1000 t),
and UCGM's "few" mode with fresh noise (stochast_ratio 1) is its sampler. tt is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ...ops import OpTable, ops_for
from ..config import Heads, NetworkConfig, second_embedder
from ..context import Context as PromptContext
from ..context import host_lengths
from ..folding import Absorption, Resident
from ..layers import (
    BLOCK_CONSTANTS,
    EPS,
    IDENTITY,
    Constants,
    MixFeedForward,
    ModuleDict,
    ModuleList,
    SinusoidEmbedder,
    Stream,
    add_branch,
    channels_last,
    linear32,
    signed,
    time_sign,
    with_gelu,
)
from ..velocity_network import VelocityNetwork

QK_EPS = 1e-5
TIME_SCALE = 1000.0
GUIDANCE = 4.5  # SANA-Sprint's default guidance scale, part of its constants

FUSED = {"attn1.to_qkv.weight": ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight")} | {
    f"attn2.to_kv.{leaf}": (f"attn2.to_k.{leaf}", f"attn2.to_v.{leaf}") for leaf in ("weight", "bias")
}


@dataclass(frozen=True)
class SanaConfig(Heads, NetworkConfig):
    """transformer/config.json, field for field; defaults are the 1.6B release."""

    class_name = "SanaTransformer2DModel"
    unread = ("dropout", "timestep_scale")  # training, and other samplers' way to scale time

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = EPS
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        fixed = {
            "patch_size": 1, "attention_bias": False, "norm_elementwise_affine": False, "norm_eps": EPS,
            "interpolation_scale": None, "out_channels": self.in_channels, "cross_attention_dim": self.dim,
        }  # fmt: skip
        for name, value in fixed.items():
            if (given := getattr(self, name)) != value:
                raise ConfigError(
                    f"{name} is {given!r}, only {value!r} is supported: that of SANA 0.6B, 1.6B and SANA-Sprint; "
                    "check transformer/config.json"
                )
        if self.qk_norm not in (None, "rms_norm_across_heads"):
            raise ConfigError(
                f"qk_norm {self.qk_norm!r} is not supported; SANA has none and SANA-Sprint 'rms_norm_across_heads'"
            )
        if self.num_layers < 1:
            raise ConfigError(f"num_layers is {self.num_layers}; check transformer/config.json")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """As `NetworkConfig.from_dict`; out_channels null means in_channels."""
        if raw.get("out_channels", 0) is None:
            raw = {**raw, "out_channels": raw.get("in_channels", cls.in_channels)}
        return super().from_dict(raw)

    @property
    def head_dim(self) -> int:
        """Of softmax attention, which only the prompt gets."""
        return self.cross_attention_head_dim

    @property
    def linear_head_dim(self) -> int:
        """Of the image's linear attention."""
        return self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Width of the Mix-FFN."""
        return int(self.mlp_ratio * self.dim)


class TimeModulation(nn.Module):
    """The constants that all blocks share [B, 6, dim], and the conditioning of the closing norm [B, dim].

    One embedder of the adaLN-single scheme. guided: with one of the guidance scale beside it (SANA-Sprint), whose
    names in the checkpoint differ, too.
    """

    def __init__(self, dim: int, guided: bool) -> None:
        super().__init__()
        self.guided = guided
        if guided:
            self.timestep_embedder, self.guidance_embedder = SinusoidEmbedder(dim), SinusoidEmbedder(dim)
        else:
            self.emb = nn.ModuleDict({"timestep_embedder": SinusoidEmbedder(dim)})
        self.linear = nn.Linear(dim, BLOCK_CONSTANTS * dim)

    def forward(self, time: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return both of time [B], as the embedder takes it, and guidance [B or 1], where `guided`."""
        if self.guided:
            condition = self.timestep_embedder(time) + self.guidance_embedder(guidance)
        else:
            condition = self.emb["timestep_embedder"](time)
        return linear32(self.linear, F.silu(condition)).unflatten(-1, (BLOCK_CONSTANTS, -1)), condition


class LinearAttention(nn.Module):
    """Linear attention among image tokens. normed: with an RMSNorm of whole queries and keys. bias: whether the input
    projection has one, which only absorbed constants give it."""

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
    """Attention of image tokens to prompt tokens, whose keys and values depend on the prompt alone."""

    def __init__(self, dim: int, heads: int, head_dim: int, normed: bool) -> None:
        super().__init__()
        inner, self.heads, self.normed = heads * head_dim, heads, normed
        self.to_q, self.to_kv = nn.Linear(dim, inner), nn.Linear(dim, 2 * inner)
        if normed:
            self.norm_q, self.norm_k = nn.RMSNorm(inner, eps=QK_EPS), nn.RMSNorm(inner, eps=QK_EPS)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def keys_values(self, prompt: Tensor, ops: OpTable) -> Tensor:
        """Return keys and values [B, L, 2, heads, head_dim] of prompt tokens [B, L, dim]."""
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
    """One block. steps: None has the table that the shared constants are added to, N > 0 a table of N rows of their
    sum, 0 neither (the constants are inside the weights)."""

    table: Tensor

    def __init__(
        self, dim: int, heads: int, cross: tuple[int, int], hidden: int, normed: bool, steps: int | None
    ) -> None:
        super().__init__()
        self.attn1 = LinearAttention(dim, heads, normed, bias=steps == 0)
        self.attn2 = CrossAttention(dim, *cross, normed)
        self.ff = MixFeedForward(dim, hidden)
        if steps is None:
            self.scale_shift_table = nn.Parameter(torch.empty(BLOCK_CONSTANTS, dim))
        elif steps:
            self.register_buffer("table", torch.empty(steps, BLOCK_CONSTANTS, dim))

    def constants(self, shared: Tensor) -> Tensor:
        """Return the block's constants [B, 6, dim] float32, from those that all blocks share."""
        return effective(self.scale_shift_table, shared, scales=(1, 4))

    def forward(
        self, image: Stream, keys_values: Tensor, lengths: Tensor | None, now: Constants, after: Constants,
        height: int, ops: OpTable, reader: nn.Module | None = None,
    ) -> Stream:  # fmt: skip
        """Return the image after the block, under the norm of `reader`, the layer that reads it. now, after: the
        constants of this block and of the reader. height: of the grid of tokens."""
        x = add_branch(image[0], self.attn1(image[1], ops), now.gate_a, ops)
        branch = self.attn2(x, keys_values, lengths, ops)
        x, h = ops.residual_layer_norm(x, branch, None, now.scale_f, now.shift_f, EPS)
        branch = self.ff(h.unflatten(1, (height, -1))).flatten(1, 2)
        return ops_for(reader, ops).residual_layer_norm(x, branch, now.gate_f, after.scale_a, after.shift_a, EPS)


def effective(table: Tensor, shared: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Return table [R, dim] + shared [B, R or 1, dim], float32. scales: rows that multiply, to which 1 is added."""
    one = table.new_zeros(len(table), 1, dtype=torch.float32)
    one[list(scales)] = 1
    return table.float() + shared + one


@dataclass(frozen=True)
class Modulation:
    """Constants of each block, and of the closing norm: `shift_a`, `scale_a`."""

    blocks: tuple[Constants, ...]
    final: Constants


@dataclass(frozen=True)
class Context(PromptContext):
    """The prompt as cross attention reads it.

    keys_values: [B, layers, L, 2, heads, head_dim]. ragged: `lengths` as int64 [B] on the device where
    they differ, else None: no mask is needed.
    """

    prompt_axes: ClassVar[dict[str, int]] = {"tokens": 1, "keys_values": 2}

    keys_values: Tensor
    ragged: Tensor | None = None


class SanaTransformer(VelocityNetwork):
    """F(x_t, t, tt, prompt), the velocity z - x, in one of the three layouts above."""

    second_embedder = "time_embed_2"
    table: Tensor

    def __init__(self, config: SanaConfig, *, folded_steps: int | None = None, absorbed: bool = False) -> None:
        super().__init__(config, folded_steps, absorbed)
        dim, guided, rows = config.dim, config.guidance_embeds, 0 if absorbed else folded_steps
        cross = config.num_cross_attention_heads, config.cross_attention_head_dim
        self.patch_embed = ModuleDict({"proj": nn.Conv2d(config.in_channels, dim, 1)})
        self.caption_projection = ModuleDict(
            {"linear_1": nn.Linear(config.caption_channels, dim), "linear_2": nn.Linear(dim, dim)}
        )
        self.caption_norm = nn.RMSNorm(dim, eps=QK_EPS)
        self.transformer_blocks = ModuleList(
            Block(dim, config.num_attention_heads, cross, config.hidden, config.qk_norm is not None, rows)
            for _ in range(config.num_layers)
        )
        self.proj_out = nn.Linear(dim, config.out_channels)
        if rows is None:
            self.time_embed, self.time_sign_embed = TimeModulation(dim, guided), time_sign(config, dim)
            if config.twinflow and not guided:
                self.time_embed_2 = TimeModulation(dim, guided)
            self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        elif rows:
            self.register_buffer("table", torch.empty(rows, 2, dim))

    @property
    def prompt_modules(self) -> tuple[str, ...]:
        parts = ("attn2.to_kv", *(("attn2.norm_k",) if self.config.qk_norm else ()))
        blocks = (f"transformer_blocks.{i}.{part}" for i in range(self.config.num_layers) for part in parts)
        return ("caption_projection", "caption_norm", *blocks)

    # -- time -----------------------------------------------------------------------------------

    def embed_time(self, t: Tensor, tt: Tensor) -> tuple[Tensor, Tensor]:
        """Return what all blocks share [B, 6, dim], and the closing norm's conditioning [B, dim], float32."""
        if self.config.guidance_embeds:
            guidance = t.double().new_tensor([GUIDANCE * self.config.guidance_embeds_scale])
            return self.time_embed(t.double(), guidance)
        t, target = self.times(t, tt)
        shared, condition = self.time_embed(TIME_SCALE * t)
        if target is None:
            return shared, signed(condition, self.time_sign_embed)
        gap = (t - target).float()[:, None]
        shared_2, condition_2 = self.time_embed_2(TIME_SCALE * target)
        return shared + gap[..., None] * shared_2, condition + gap * condition_2

    def modulate(self, t: Tensor, tt: Tensor) -> Modulation:
        """Return the constants at times t, tt ([B], in [-1, 1])."""
        shared, condition = self.embed_time(t, tt)
        blocks = tuple(Constants.of(block.constants(shared)) for block in self.transformer_blocks)
        return Modulation(blocks, Constants.of(self._final_rows(condition)))

    def _final_rows(self, condition: Tensor) -> Tensor:
        """Return shift and scale of the closing norm, [B, 2, dim]."""
        return effective(self.scale_shift_table, condition[:, None], scales=(1,))

    def fold(self, t: Tensor, tt: Tensor, resident: Resident) -> Iterator[tuple[str, Tensor]]:
        with resident("time_embed", "time_embed_2", "time_sign_embed"):
            shared, condition = self.embed_time(t, tt)
        for i, block in enumerate(self.transformer_blocks):
            with resident(f"transformer_blocks.{i}.scale_shift_table"):
                yield f"transformer_blocks.{i}.table", block.constants(shared)
        with resident("scale_shift_table"):
            yield "table", self._final_rows(condition)

    def absorptions(self) -> dict[str, Absorption]:
        """Return, by linear layer, the table rows that its weight and bias take in for one step."""
        out = {"proj_out": Absorption("table", shift=0, scale=1)}
        for i in range(self.config.num_layers):
            at = f"transformer_blocks.{i}."
            out[f"{at}attn1.to_qkv"] = Absorption(f"{at}table", shift=0, scale=1, bias=False)
            out[f"{at}attn1.to_out.0"] = Absorption(f"{at}table", gate=2)
            out[f"{at}ff.conv_inverted"] = Absorption(f"{at}table", shift=3, scale=4)
            out[f"{at}ff.conv_point"] = Absorption(f"{at}table", gate=5, bias=False)
        return out

    def step_modulation(self, step: int) -> Modulation:
        if self.absorbed:
            return Modulation((IDENTITY,) * self.config.num_layers, IDENTITY)
        row = slice(step, step + 1)
        blocks = tuple(Constants.of(block.table[row]) for block in self.transformer_blocks)
        return Modulation(blocks, Constants.of(self.table[row]))

    # -- network --------------------------------------------------------------------------------

    def encode_context(self, prompt_embeds: Tensor, lengths: Sequence[int] | Tensor) -> Context:
        """Return the prompts after `caption_projection`, up to the keys and values of every block."""
        counts, longest, ragged = host_lengths(prompt_embeds, lengths)
        first, second = self.caption_projection.values()
        tokens = second(with_gelu(first, prompt_embeds[:, :longest], self.ops))
        tokens = self.ops.rms_norm(tokens, self.caption_norm.weight.float(), QK_EPS)
        if ragged is not None:  # what is masked must still be finite
            valid = torch.arange(longest, device=tokens.device) < ragged[:, None]
            tokens = torch.where(valid[..., None], tokens, 0)
        keys_values = [block.attn2.keys_values(tokens, self.ops) for block in self.transformer_blocks]
        return Context(tokens, counts, torch.stack(keys_values, 1), ragged)

    def patches(self, latents: Tensor, modulation: Modulation, context: Context) -> tuple[Tensor, float]:
        height, proj = latents.shape[2], self.patch_embed["proj"]
        x = F.linear(latents.flatten(2).transpose(1, 2), proj.weight.flatten(1), proj.bias)
        first = modulation.blocks[0]
        readers = [block.attn1.to_qkv for block in self.transformer_blocks]
        image = x, ops_for(readers[0], self.ops).layer_norm(x, first.scale_a, EPS, first.shift_a)
        following = (*modulation.blocks[1:], modulation.final), (*readers[1:], self.proj_out)
        prompts = context.keys_values.to(x.dtype).unbind(1)
        each = zip(self.transformer_blocks, prompts, modulation.blocks, *following, strict=True)
        for block, prompt, now, after, reader in each:
            image = block(image, prompt, context.ragged, now, after, height, self.ops, reader)
        return channels_last(self.proj_out(image[1]), height, latents.shape[3], 1), 1.0


LAYOUT = Layout(
    FUSED, (), float32_where(".norm_", "caption_norm."),
    second_embedder(SanaTransformer.second_embedder, "SANA"),
)  # fmt: skip
