"""Qwen-Image velocity network with TwinFlow's second time embedder (diffusers: QwenImageTransformer2DModel).

Image and prompt tokens are two streams with their own weights, meeting in one joint attention per
block. With LN a LayerNorm without parameters, every block does to each stream

    x <- x + gate * f(LN(x) * scale + shift)        f = joint attention, then a GELU MLP,

where scale, shift and gate depend on time alone. They are held in one of three ways:

    layers    as in the checkpoint: `modulate` computes them from (t, tt);
    tables    `folded_steps=N`: N rows of them, and nothing that made them;
    weights   `folded_steps=1, absorbed=True`: inside the linear layers next to them, which leaves a
              plain pre-norm transformer. `absorptions` says what goes where.

One forward serves all: in the last one every constant is None, the identity of the ops.

TwinFlow's time: temb = e1(t) + (t - tt) * e2(tt). The output is the velocity z - x itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
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
    JOINT_FUSED,
    Constants,
    FeedForward,
    JointAttention,
    ModuleDict,
    ModuleList,
    Readers,
    SinusoidEmbedder,
    Stream,
    channels_first,
    finish_block,
    modulation_rows,
    pack,
    signed,
    time_sign,
    unpack,
)
from ..token_split import WHOLE, TokenSplit
from ..velocity_network import VelocityNetwork

TIME_SCALE = 1000.0
ROPE_THETA = 10000.0

FUSED = JOINT_FUSED


@dataclass(frozen=True)
class QwenImageConfig(Heads, NetworkConfig):
    """transformer/config.json, field for field; defaults are the 20B release."""

    class_name = "QwenImageTransformer2DModel"
    unread = ("pooled_projection_dim",)  # in released files
    variants = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
    variant_hint = (
        "a variant of Qwen-Image for editing, layers or guidance; use a text-to-image checkpoint (docs/editing.md)"
    )

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        if self.patch_size != 2 or self.in_channels != 4 * self.out_channels:
            raise ConfigError(
                f"patch_size {self.patch_size}, in_channels {self.in_channels}, out_channels "
                f"{self.out_channels}: Qwen-Image packs latents 2x2, so in_channels = 4 * out_channels; "
                "check transformer/config.json"
            )
        self.require_axes(self.axes_dims_rope, 3)
        if self.num_layers < 1:
            raise ConfigError(f"num_layers is {self.num_layers}; check transformer/config.json")


class TimeEmbedding(nn.Module):
    """The embedding [B, dim] float32 of times [B] in [-1, 1]."""

    def __init__(self, dim: int, sign: nn.Linear | None = None) -> None:
        super().__init__()
        self.timestep_embedder, self.time_sign_embed = SinusoidEmbedder(dim), sign

    def forward(self, t: Tensor) -> Tensor:
        return signed(self.timestep_embedder(t, TIME_SCALE), self.time_sign_embed)


class Block(nn.Module):
    """One block. steps: None builds the modulation layers, N > 0 tables of N rows, 0 neither.

    prompt_output=False leaves out what only a later block would read.
    """

    img_table: Tensor
    txt_table: Tensor

    def __init__(self, heads: int, head_dim: int, steps: int | None, prompt_output: bool) -> None:
        super().__init__()
        dim = heads * head_dim
        self.attn = JointAttention(heads, head_dim, prompt_output)
        self.img_mlp = FeedForward(dim)
        if prompt_output:
            self.txt_mlp = FeedForward(dim)
        for stream in ("img", "txt"):
            if steps is None:
                layer = nn.Sequential(nn.SiLU(), nn.Linear(dim, BLOCK_CONSTANTS * dim))
                setattr(self, f"{stream}_mod", layer)
            elif steps:
                self.register_buffer(f"{stream}_table", torch.empty(steps, BLOCK_CONSTANTS, dim))

    def constants(self, stream: str, temb: Tensor) -> Tensor:
        """Return the constants of "img" or "txt", [B, 6, dim] float32."""
        return modulation_rows(getattr(self, f"{stream}_mod")[1], temb, scales=(1, 4))

    def forward(
        self, image: Stream, prompt: Stream, now: tuple[Constants, Constants],
        after: tuple[Constants, Constants | None], rope: tuple[Tensor, Tensor],
        lengths: Tensor | None, ops: OpTable, readers: Readers = (None, None),
    ) -> tuple[Stream, Stream | None]:  # fmt: skip
        """Return both streams after the block, under the norms of `readers`, the layers that read them.

        now: this block's constants of both streams; after: those of the readers, None for the prompt where there is
        none. lengths: keys that count, image and prompt together.
        """
        n = image[0].shape[1]
        out = self.attn(image[1], prompt[1], rope, lengths, n if after[1] is None else None, ops)
        image = finish_block(image[0], self.attn.to_out[0](out[:, :n]), self.img_mlp, now[0], after[0], readers[0], ops)
        if after[1] is None:
            return image, None
        branch = self.attn.to_add_out(out[:, n:])
        return image, finish_block(prompt[0], branch, self.txt_mlp, now[1], after[1], readers[1], ops)


@dataclass(frozen=True)
class Modulation:
    """Constants of each block, (image, prompt), and of the closing norm: `shift_a`, `scale_a`."""

    blocks: tuple[tuple[Constants, Constants], ...]
    final: Constants


@dataclass(frozen=True)
class Context(PromptContext):
    """The prompt's tokens as they enter the first block, zero beyond a sample's length.

    ragged: `lengths` as int64 [B] on the device where they differ, else None: no mask is needed.
    """

    ragged: Tensor | None = None


class QwenImageTransformer(VelocityNetwork):
    """F(x_t, t, tt, prompt), the velocity z - x, in one of the three layouts above."""

    second_embedder = "time_text_embed_2"
    prompt_modules = ("txt_norm", "txt_in")
    norm_out_table: Tensor

    def __init__(
        self, config: QwenImageConfig, *, folded_steps: int | None = None, absorbed: bool = False
    ) -> None:
        super().__init__(config, folded_steps, absorbed)
        self.sequence: TokenSplit = WHOLE
        dim, folded, rows = config.dim, folded_steps is not None, 0 if absorbed else folded_steps
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        self.img_in = nn.Linear(config.in_channels, dim)
        self.txt_norm = nn.RMSNorm(config.joint_attention_dim, eps=EPS)
        self.txt_in = nn.Linear(config.joint_attention_dim, dim)
        # the closing block's prompt output is read by nothing: only the checkpoint's layout has it
        self.transformer_blocks = ModuleList(
            Block(heads, head_dim, rows, not folded or i + 1 < config.num_layers)
            for i in range(config.num_layers)
        )
        self.proj_out = nn.Linear(dim, config.in_channels)
        if rows is None:
            self.norm_out = ModuleDict({"linear": nn.Linear(dim, 2 * dim)})
            self.time_text_embed = TimeEmbedding(dim, time_sign(config, dim))
            if config.twinflow:
                self.time_text_embed_2 = TimeEmbedding(dim)
        elif rows:
            self.register_buffer("norm_out_table", torch.empty(rows, 2, dim))

    # -- time -----------------------------------------------------------------------------------

    def embed_time(self, t: Tensor, tt: Tensor) -> Tensor:
        """Return temb [B, dim] float32 of t, tt [B] (see the module's docstring)."""
        t, target = self.times(t, tt)
        first: Tensor = self.time_text_embed(t)
        return first if target is None else first + (t - target).float()[:, None] * self.time_text_embed_2(target)

    def modulate(self, t: Tensor, tt: Tensor) -> Modulation:
        """Return the constants at times t, tt ([B], in [-1, 1])."""
        temb = self.embed_time(t, tt)
        blocks = tuple(
            (Constants.of(b.constants("img", temb)), Constants.of(b.constants("txt", temb)))
            for b in self.transformer_blocks
        )
        return Modulation(blocks, Constants.of(self._final_rows(temb)))

    def _final_rows(self, temb: Tensor) -> Tensor:
        """Return shift and scale of the closing norm, [B, 2, dim]; the checkpoint has them the other way."""
        return modulation_rows(self.norm_out["linear"], temb, scales=(0,)).flip(1)

    def fold(self, t: Tensor, tt: Tensor, resident: Resident) -> Iterator[tuple[str, Tensor]]:
        with resident("time_text_embed", "time_text_embed_2"):
            temb = self.embed_time(t, tt)
        for i, block in enumerate(self.transformer_blocks):
            for stream in ("img", "txt"):
                with resident(f"transformer_blocks.{i}.{stream}_mod"):
                    yield f"transformer_blocks.{i}.{stream}_table", block.constants(stream, temb)
        with resident("norm_out"):
            yield "norm_out_table", self._final_rows(temb)

    def absorptions(self) -> dict[str, Absorption]:
        """Return, by linear layer, the table rows that its weight and bias take in for one step."""
        out = {"proj_out": Absorption("norm_out_table", shift=0, scale=1)}
        for i in range(self.config.num_layers):
            at = f"transformer_blocks.{i}."
            for stream, qkv, back in (("img", "to_qkv", "to_out.0"), ("txt", "add_qkv", "to_add_out")):
                table = f"{at}{stream}_table"
                out[f"{at}attn.{qkv}"] = Absorption(table, shift=0, scale=1)
                out[f"{at}attn.{back}"] = Absorption(table, gate=2)
                out[f"{at}{stream}_mlp.net.0.proj"] = Absorption(table, shift=3, scale=4)
                out[f"{at}{stream}_mlp.net.2"] = Absorption(table, gate=5)
        present = {name for name, _ in self.named_modules()}
        return {name: what for name, what in out.items() if name in present}

    def step_modulation(self, step: int) -> Modulation:
        if self.absorbed:
            return Modulation(((IDENTITY, IDENTITY),) * self.config.num_layers, IDENTITY)
        row = slice(step, step + 1)
        blocks = tuple(
            (Constants.of(b.img_table[row]), Constants.of(b.txt_table[row]))
            for b in self.transformer_blocks
        )
        return Modulation(blocks, Constants.of(self.norm_out_table[row]))

    # -- network --------------------------------------------------------------------------------

    def guide(self, asked: Tensor, empty: Tensor, scale: float) -> Tensor:
        """As of others, each token in the norm that it has without guidance (diffusers' true_cfg_scale)."""
        guided, (height, width) = super().guide(asked, empty, scale), (n // 2 for n in asked.shape[2:])
        tokens = pack(guided)
        norms = pack(asked).norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)
        return unpack(tokens * norms, height, width)

    def encode_context(self, prompt_embeds: Tensor, lengths: Sequence[int] | Tensor) -> Context:
        """Return the prompts after `txt_norm` and `txt_in`."""
        counts, longest, ragged = host_lengths(prompt_embeds, lengths)
        embeds = prompt_embeds[:, :longest]
        tokens = self.txt_in(self.ops.rms_norm(embeds, self.txt_norm.weight.float(), EPS))
        if ragged is None:
            return Context(tokens, counts)
        valid = torch.arange(longest, device=tokens.device) < ragged[:, None]
        return Context(torch.where(valid[..., None], tokens, 0), counts, ragged)

    def patches(self, latents: Tensor, modulation: Modulation, context: Context) -> tuple[Tensor, float]:
        height, width = (n // 2 for n in latents.shape[2:])
        split, n, longest = self.sequence, height * width, context.tokens.shape[1]
        x, c = self.img_in(split.share(pack(latents), n)), split.share(context.tokens.to(latents.dtype), longest)
        cos, sin = self._rope(height, width, longest, x.device)
        rope = split.share(cos, n, longest), split.share(sin, n, longest)
        lengths = split.keys(None if context.ragged is None else context.ragged + n, n, longest)
        of_x, of_c = modulation.blocks[0]
        readers = [(block.attn.to_qkv, block.attn.add_qkv) for block in self.transformer_blocks]
        image = x, ops_for(readers[0][0], self.ops).layer_norm(x, of_x.scale_a, EPS, of_x.shift_a)
        prompt = c, ops_for(readers[0][1], self.ops).layer_norm(c, of_c.scale_a, EPS, of_c.shift_a)
        following = (*modulation.blocks[1:], (modulation.final, None)), (*readers[1:], (self.proj_out, None))
        each = zip(self.transformer_blocks, modulation.blocks, *following, strict=True)
        for block, now, after, next_readers in each:
            image, prompt = block(image, prompt, now, after, rope, lengths, self.ops, next_readers)
        return channels_first(split.whole(self.proj_out(image[1]), n), height, width, 2), 1.0

    def _rope(self, height: int, width: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos, sin [1, height*width + length, head_dim/2] float32.

        An image token sits at (0, row, column) counted from the centre, prompt token j at
        (p, p, p), p = max(height, width) // 2 + j. Angles are float32 as in the reference.
        """
        rows = torch.arange(height, device=device).repeat_interleave(width) - (height - height // 2)
        columns = torch.arange(width, device=device).repeat(height) - (width - width // 2)
        text = torch.arange(length, device=device) + max(height, width) // 2
        angles = []
        for image, dim in zip((torch.zeros_like(rows), rows, columns), self.config.axes_dims_rope, strict=True):
            exponents = torch.arange(0, dim, 2, device=device).float() / dim
            angles.append(torch.outer(torch.cat((image, text)).float(), 1.0 / ROPE_THETA**exponents))
        joint = torch.cat(angles, 1)[None]
        return joint.cos(), joint.sin()


LAYOUT = Layout(
    FUSED, ("time_sign_embed.",), float32_where(".norm_", "txt_norm."),  # which SimpleTuner's network has twice
    second_embedder(QwenImageTransformer.second_embedder, "Qwen-Image"),
)  # fmt: skip
