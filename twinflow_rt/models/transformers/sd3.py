"""Stable Diffusion 3.5 velocity network with TwinFlow's second embedder (diffusers: SD3Transformer2DModel).

Two streams meet in one joint attention per block (`models.layers`); the first blocks have a second attention
of image tokens alone. Conditioning is time *and* the pooled prompt p,

    temb = e1(1000 t) + g1(p) + (t - tt) * (e2(1000 tt) + g2(p)),

e and g being the two parts of `time_text_embed` and `time_text_embed_2`. So modulation is constant
per prompt, not per model: folding leaves of e1 and e2 a table of N rows, and `encode_context`
evaluates every modulation once per prompt, for all N steps. The output is the velocity z - x itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ...ops import OpTable, ops_for
from ..config import Heads, NetworkConfig, second_embedder
from ..context import Context as PromptContext
from ..context import all_rows
from ..folding import Resident
from ..layers import (
    EPS,
    JOINT_FUSED,
    Constants,
    FeedForward,
    JointAttention,
    ModuleDict,
    ModuleList,
    Readers,
    SinusoidEmbedder,
    Stream,
    add_branch,
    channels_last,
    finish_block,
    linear32,
    modulation_rows,
    pack,
    signed,
    time_sign,
)
from ..velocity_network import VelocityNetwork

Rope = tuple[Tensor, Tensor]
TIME_SCALE = 1000.0

FUSED = JOINT_FUSED | {
    f"attn2.to_qkv.{leaf}": tuple(f"attn2.{part}.{leaf}" for part in ("to_q", "to_k", "to_v"))
    for leaf in ("weight", "bias")
}


@dataclass(frozen=True)
class SD3Config(Heads, NetworkConfig):
    """transformer/config.json, field for field; defaults are the 3.5 Medium release."""

    class_name = "SD3Transformer2DModel"

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 384
    dual_attention_layers: tuple[int, ...] = tuple(range(13))
    qk_norm: str | None = "rms_norm"

    def __post_init__(self) -> None:
        if self.patch_size != 2 or self.in_channels != self.out_channels:
            raise ConfigError(
                f"patch_size {self.patch_size}, in_channels {self.in_channels}, out_channels {self.out_channels}: "
                "SD3.5 has patches of 2 and as many channels out as in; check transformer/config.json"
            )
        if self.qk_norm != "rms_norm":
            raise ConfigError(
                f"qk_norm is {self.qk_norm!r}: SD3.5 normalises queries and keys ('rms_norm'), SD3 does not and is "
                "not supported; use a TwinFlow checkpoint of SD3.5"
            )
        if self.caption_projection_dim != self.dim or self.attention_head_dim % 2:
            raise ConfigError(
                f"caption_projection_dim {self.caption_projection_dim} must equal num_attention_heads * "
                f"attention_head_dim = {self.dim}, the latter even; check transformer/config.json"
            )
        stray = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if self.num_layers < 1 or stray:
            raise ConfigError(
                f"dual_attention_layers {stray} are not among the {self.num_layers} layers; "
                "check transformer/config.json"
            )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """As `NetworkConfig.from_dict`; SD3's own files leave out what SD3.5 added."""
        return super().from_dict({"qk_norm": None, "dual_attention_layers": (), **raw})


class TextEmbedder(nn.Module):
    """The embedding [B, dim] float32 of pooled prompts [B, P]."""

    def __init__(self, pooled_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(pooled_dim, dim), nn.Linear(dim, dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return linear32(self.linear_2, F.silu(linear32(self.linear_1, pooled.float())))


class TimeTextEmbedding(nn.Module):
    """One embedder of time and pooled prompt; the sum of its two parts conditions the network.

    timed=False leaves out the time's part, of which a folded network has the values.
    """

    def __init__(self, pooled_dim: int, dim: int, timed: bool) -> None:
        super().__init__()
        self.text_embedder = TextEmbedder(pooled_dim, dim)
        if timed:
            self.timestep_embedder = SinusoidEmbedder(dim)


class SelfAttention(nn.Module):
    """Attention among image tokens alone."""

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
    """One block. dual: with a second attention, of image tokens alone, that reads the same norm under a modulation of
    its own. prompt_output=False leaves out what only a later block would read. rows: constants of the block."""

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
        """Return the block's constants [B, rows, dim] float32 at temb [B, dim], in the order that `read` takes them."""
        image = modulation_rows(self.norm1["linear"], temb, (1, 4, 7) if self.dual else (1, 4))
        if self.prompt_output:
            return torch.cat((image, modulation_rows(self.norm1_context["linear"], temb, (1, 4))), 1)
        # the closing block has the prompt's scale before its shift
        return torch.cat((image, modulation_rows(self.norm1_context["linear"], temb, (0,)).flip(1)), 1)

    def read(self, rows: Tensor) -> Modulation:
        """Return the modulation in rows [B or 1, R, dim]: of the image (6), its second attention (3), the prompt."""
        first, rest = rows[:, :6], rows[:, 6:]
        if not self.dual:
            return Modulation(Constants.of(first), Constants.of(rest))
        return Modulation(Constants.of(first), Constants.of(rest[:, 3:]), Constants.of(rest[:, :3]))

    def forward(
        self, image: Stream, prompt: Stream, now: Modulation, after: tuple[Constants, Constants | None],
        rope: tuple[Rope, Rope], ops: OpTable, readers: Readers = (None, None),
    ) -> tuple[Stream, Stream | None]:  # fmt: skip
        """Return both streams after the block, under the norms of `readers`, the layers that read them. after: the
        readers' constants. rope: of the joint sequence, and of the image's."""
        (x, h), n, own = image, image[0].shape[1], now.image
        out = self.attn(h, prompt[1], rope[0], None, None if self.prompt_output else n, ops)
        branch = self.attn.to_out[0](out[:, :n])
        if now.second is not None:
            h = ops_for(self.attn2.to_qkv, ops).layer_norm(x, now.second.scale_a, EPS, now.second.shift_a)
            x = add_branch(x, branch, own.gate_a, ops)
            branch, own = self.attn2(h, rope[1], ops), own._replace(gate_a=now.second.gate_a)
        image = finish_block(x, branch, self.ff, own, after[0], readers[0], ops)
        if after[1] is None:
            return image, None
        branch = self.attn.to_add_out(out[:, n:])
        return image, finish_block(prompt[0], branch, self.ff_context, now.prompt, after[1], readers[1], ops)


@dataclass(frozen=True)
class Context(PromptContext):
    """The prompt's tokens as they enter the first block, and all that its pooled form modulates.

    pooled: [B, P]. constants: [B, N, R, dim] float32, for each of N folded evaluations the rows of
    every block and then two of the closing norm; None before folding.
    """

    pooled: Tensor
    constants: Tensor | None = None


class PatchEmbed(nn.Module):
    """2x2 patches with absolute positions, a table of which the middle is used."""

    pos_embed: Tensor

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.size = config.pos_embed_max_size
        self.proj = nn.Conv2d(config.in_channels, config.dim, 2, 2)
        self.register_buffer("pos_embed", torch.empty(1, self.size**2, config.dim))

    def forward(self, latents: Tensor) -> Tensor:
        """Return the tokens [B, H/2*W/2, dim] of latents [B, C, H, W]."""
        height, width = (n // 2 for n in latents.shape[2:])
        if max(height, width) > self.size:
            raise ConfigError(
                f"latents of {2 * height}x{2 * width} exceed the {2 * self.size} that the checkpoint has "
                "positions for; generate a smaller image"
            )
        x = F.linear(pack(latents), self.proj.weight.flatten(1), self.proj.bias)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        table = self.pos_embed.unflatten(1, (self.size, self.size))
        return x + table[:, top : top + height, left : left + width].flatten(1, 2).to(x.dtype)


class SD3Transformer(VelocityNetwork):
    """F(x_t, t, tt, prompt), the velocity z - x. folded_steps=N builds the compiled layout."""

    second_embedder = "time_text_embed_2"
    time_table: Tensor
    gap_table: Tensor
    fixed_length = True

    def __init__(self, config: SD3Config, *, folded_steps: int | None = None) -> None:
        super().__init__(config, folded_steps)
        dim, pooled, timed = config.dim, config.pooled_projection_dim, folded_steps is None
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbedding(pooled, dim, timed)
        if config.twinflow:
            self.time_text_embed_2 = TimeTextEmbedding(pooled, dim, timed)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        self.transformer_blocks = ModuleList(
            Block(
                config.num_attention_heads, config.attention_head_dim,
                i in config.dual_attention_layers, i + 1 < config.num_layers,
            )
            for i in range(config.num_layers)
        )  # fmt: skip
        self.norm_out = ModuleDict({"linear": nn.Linear(dim, 2 * dim)})
        self.proj_out = nn.Linear(dim, 4 * config.out_channels)
        self.time_sign_embed = time_sign(config, dim) if timed else None
        if folded_steps is not None:
            self.register_buffer("time_table", torch.empty(folded_steps, dim))
            if config.twinflow:
                self.register_buffer("gap_table", torch.empty(folded_steps, 1))

    @property
    def prompt_modules(self) -> tuple[str, ...]:
        blocks = range(self.config.num_layers)
        norms = (f"transformer_blocks.{i}.{name}" for i in blocks for name in ("norm1", "norm1_context"))
        embedders = ("time_text_embed", *("time_text_embed_2",) * self.config.twinflow)
        return ("context_embedder", *embedders, *norms, "norm_out")

    # -- conditioning ---------------------------------------------------------------------------

    def embed_time(self, t: Tensor, tt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the time's part of temb [B, dim], and t - tt [B, 1] (None without a second embedder), float32, of
        t, tt [B]."""
        t, target = self.times(t, tt)
        first = signed(self.time_text_embed.timestep_embedder(TIME_SCALE * t), self.time_sign_embed)
        if target is None:
            return first, None
        gap = (t - target).float()[:, None]
        return first + gap * self.time_text_embed_2.timestep_embedder(TIME_SCALE * target), gap

    def modulate(self, t: Tensor, tt: Tensor, context: Context) -> Tensor:
        """Return the constants [B, R, dim] float32 of the context's prompts at times t, tt ([B], in [-1, 1])."""
        return self._constants(*self.embed_time(t, tt), context.pooled)

    def _constants(self, time: Tensor, gap: Tensor | None, pooled: Tensor) -> Tensor:
        temb = time + self.time_text_embed.text_embedder(pooled)
        if gap is not None:
            temb = temb + gap * self.time_text_embed_2.text_embedder(pooled)
        rows = [block.constants(temb) for block in self.transformer_blocks]
        # the closing norm has its scale before its shift
        return torch.cat((*rows, modulation_rows(self.norm_out["linear"], temb, (0,)).flip(1)), 1)

    def fold(self, t: Tensor, tt: Tensor, resident: Resident) -> Iterator[tuple[str, Tensor]]:
        with resident("time_text_embed.timestep_embedder", "time_text_embed_2.timestep_embedder", "time_sign_embed"):
            time, gap = self.embed_time(t, tt)
        yield "time_table", time
        if gap is not None:
            yield "gap_table", gap

    def step_modulation(self, step: int) -> int:
        """Return which row of a context's constants evaluation `step` reads: they depend on the prompt, too."""
        return step

    # -- network --------------------------------------------------------------------------------

    def encode_context(self, prompt_embeds: Tensor, lengths: Sequence[int] | Tensor, pooled: Tensor) -> Context:
        """Return the prompts after `context_embedder`, and all constants that depend on them.

        Every row of prompt_embeds [B, L, joint_attention_dim] counts, as in the reference: lengths must all be L (on
        the device they are not looked at). pooled: [B, pooled_projection_dim].
        """
        counts = all_rows(prompt_embeds, lengths, "SD3.5")
        tokens, constants = self.context_embedder(prompt_embeds), None
        if self.folded_steps is not None:
            gaps = self.gap_table.split(1) if self.config.twinflow else (None,) * self.folded_steps
            rows = [self._constants(*each, pooled) for each in zip(self.time_table.split(1), gaps, strict=True)]
            constants = torch.stack(rows, 1)
        return Context(tokens, counts, pooled, constants)

    def patches(self, latents: Tensor, modulation: Tensor | int, context: Context) -> tuple[Tensor, float]:
        if isinstance(modulation, int):
            assert context.constants is not None, "a folded network's context has its constants"
            modulation = context.constants[:, modulation]
        rows = modulation
        *parts, closing = rows.split([*(block.rows for block in self.transformer_blocks), 2], 1)
        now = [block.read(part) for block, part in zip(self.transformer_blocks, parts, strict=True)]
        x, c = self.pos_embed(latents), context.tokens.to(latents.dtype)
        rope = self._no_rope(x.shape[1] + c.shape[1], x.device), self._no_rope(x.shape[1], x.device)
        readers = [(block.attn.to_qkv, block.attn.add_qkv) for block in self.transformer_blocks]
        image = x, ops_for(readers[0][0], self.ops).layer_norm(x, now[0].image.scale_a, EPS, now[0].image.shift_a)
        prompt = c, ops_for(readers[0][1], self.ops).layer_norm(c, now[0].prompt.scale_a, EPS, now[0].prompt.shift_a)
        constants = *((m.image, m.prompt) for m in now[1:]), (Constants.of(closing), None)
        following = constants, (*readers[1:], (self.proj_out, None))
        for block, own, after, next_readers in zip(self.transformer_blocks, now, *following, strict=True):
            image, prompt = block(image, prompt, own, after, rope, self.ops, next_readers)
        return channels_last(self.proj_out(image[1]), latents.shape[2] // 2, latents.shape[3] // 2, 2), 1.0

    def _no_rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos, sin of no rotation at all: positions are in the tokens, the ops are those of rotary networks."""
        angles = torch.zeros(1, length, self.config.attention_head_dim // 2, dtype=torch.float32, device=device)
        return angles + 1, angles


LAYOUT = Layout(FUSED, (), float32_where(".norm_"), second_embedder(SD3Transformer.second_embedder, "SD3.5"))
