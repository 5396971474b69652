"""FLUX.2 velocity network, as klein has it: an ordinary flow model (diffusers: Flux2Transformer2DModel).

First blocks of two streams (`models.layers`, with gated MLPs), then blocks of one, image and prompt tokens together,
whose attention and gated MLP stand side by side:

    x <- x + gate * W_out [attention(h), swiglu(h)]        h = LN(x) * scale + shift

Linear layers have no biases. Scale, shift and gate depend on time alone, and all blocks of a kind share them: folding
leaves 17 rows an evaluation. A latent here is a patch of 2x2 of the VAE's, as the pipeline normalises those. The output
is the velocity z - x itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ...ops import OpTable, ops_for
from ..config import Heads, NetworkConfig
from ..context import Context, all_rows
from ..folding import Resident
from ..layers import (
    BLOCK_CONSTANTS,
    EPS,
    JOINT_FUSED,
    Constants,
    JointAttention,
    Module,
    ModuleDict,
    ModuleList,
    Readers,
    SinusoidEmbedder,
    Stream,
    channels_first,
    finish_block,
    modulation_rows,
    signed,
    time_sign,
    with_swiglu,
)
from ..velocity_network import VelocityNetwork

TIME_SCALE = 1000.0
# tables of the folded network -> (modulation layer, rows, those of them that scale)
TABLES = {
    "img_table": ("double_stream_modulation_img.linear", BLOCK_CONSTANTS, (1, 4)),
    "txt_table": ("double_stream_modulation_txt.linear", BLOCK_CONSTANTS, (1, 4)),
    "single_table": ("single_stream_modulation.linear", BLOCK_CONSTANTS // 2, (1,)),
    "final_table": ("norm_out.linear", 2, (0,)),  # scale before shift, unlike the others
}


@dataclass(frozen=True)
class Flux2Config(Heads, NetworkConfig):
    """transformer/config.json, field for field; defaults are klein's of 4B."""

    class_name = "Flux2Transformer2DModel"
    unread = ("out_channels",)
    variants = ("guidance_embeds",)
    variant_hint = "FLUX.2 with guidance embedded, as [dev] has it; FLUX.2-klein is what runs here"

    twinflow: bool = False
    patch_size: int = 1
    in_channels: int = 128
    num_layers: int = 5
    num_single_layers: int = 20
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 7680
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    eps: float = EPS

    def __post_init__(self) -> None:
        self.require_axes(self.axes_dims_rope, 4)
        fixed = self.patch_size, self.timestep_guidance_channels, self.eps
        if fixed != (1, 256, EPS) or self.in_channels % 4 or min(self.num_layers, self.num_single_layers) < 1:
            raise ConfigError(
                f"patch_size, timestep_guidance_channels, eps are {fixed}, in_channels {self.in_channels}, layers "
                f"{self.num_layers} and {self.num_single_layers}: FLUX.2 has 1, 256, {EPS}, a multiple of 4, and some "
                "of both kinds; check transformer/config.json"
            )
        if self.twinflow:
            raise ConfigError("there is no TwinFlow of FLUX.2: transformer/config.json must not say twinflow")


class FeedForward(nn.Module):
    """The gated MLP of one stream."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear_in, self.linear_out = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    @property
    def first(self) -> nn.Module:
        return self.linear_in

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.linear_out(with_swiglu(self.linear_in, x, ops_for(self.linear_out, ops)))


class Block(nn.Module):
    """One block of two streams."""

    def __init__(self, config: Flux2Config, hidden: int) -> None:
        super().__init__()
        self.attn = JointAttention(config.num_attention_heads, config.head_dim, True, bias=False)
        self.ff, self.ff_context = FeedForward(config.dim, hidden), FeedForward(config.dim, hidden)

    def forward(
        self, image: Stream, prompt: Stream, now: tuple[Constants, Constants], after: tuple[Constants, Constants],
        rope: tuple[Tensor, Tensor], ops: OpTable, readers: Readers,
    ) -> tuple[Stream, Stream]:  # fmt: skip
        """Return both streams after the block, under the norms of `readers`, whose constants are `after`."""
        n = image[0].shape[1]
        out = self.attn(image[1], prompt[1], rope, None, None, ops)
        image = finish_block(image[0], self.attn.to_out[0](out[:, :n]), self.ff, now[0], after[0], readers[0], ops)
        branch = self.attn.to_add_out(out[:, n:])
        return image, finish_block(prompt[0], branch, self.ff_context, now[1], after[1], readers[1], ops)


class ParallelAttention(Module):
    """Attention and gated MLP of one norm, [B, S, dim] -> the same."""

    def __init__(self, config: Flux2Config, hidden: int) -> None:
        super().__init__()
        dim, self.heads, self.parts = config.dim, config.num_attention_heads, (3 * config.dim, 2 * hidden)
        self.to_qkv_mlp_proj = nn.Linear(dim, 3 * dim + 2 * hidden, bias=False)
        self.norm_q, self.norm_k = (nn.RMSNorm(config.head_dim, eps=EPS) for _ in range(2))
        self.to_out = nn.Linear(dim + hidden, dim, bias=False)

    def forward(self, h: Tensor, rope: tuple[Tensor, Tensor], queries: int | None, ops: OpTable) -> Tensor:
        """Return the branch of tokens h; of the first `queries` alone if given."""
        qkv, gated = self.to_qkv_mlp_proj(h).split(self.parts, -1)
        q, k, v = ops.qk_norm_rope(qkv, self.norm_q.weight.float(), self.norm_k.weight.float(), *rope, self.heads, EPS)
        return self.to_out(torch.cat((ops.attention(q[:, :queries], k, v), ops.swiglu(gated[:, :queries])), -1))


class SingleBlock(nn.Module):
    """One block of one stream."""

    def __init__(self, config: Flux2Config, hidden: int) -> None:
        super().__init__()
        self.attn = ParallelAttention(config, hidden)

    def forward(
        self, x: Tensor, h: Tensor, gate: Tensor | None, after: Constants, rope: tuple[Tensor, Tensor],
        queries: int | None, ops: OpTable, reader: nn.Module,
    ) -> Stream:  # fmt: skip
        """Return the stream x, whose norm is h, after the block, under the norm of `reader`; of the first `queries`
        tokens alone if given."""
        branch = self.attn(h, rope, queries, ops)
        return ops_for(reader, ops).residual_layer_norm(x[:, :queries], branch, gate, after.scale_a, after.shift_a, EPS)


class Modulation(tuple[Constants, Constants, Constants, Constants]):
    """Constants of the image's and the prompt's stream, of the single stream, and of the closing norm."""


class Flux2Transformer(VelocityNetwork):
    """F(x_t, t, prompt), the velocity z - x. folded_steps=N builds the compiled layout."""

    second_embedder = "time_guidance_embed_2"  # which no file has
    prompt_modules = ("context_embedder",)
    fixed_length = True

    def __init__(self, config: Flux2Config, *, folded_steps: int | None = None) -> None:
        super().__init__(config, folded_steps)
        dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
        self.x_embedder = nn.Linear(config.in_channels, dim, bias=False)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim, bias=False)
        self.transformer_blocks = ModuleList(Block(config, hidden) for _ in range(config.num_layers))
        singles = (SingleBlock(config, hidden) for _ in range(config.num_single_layers))
        self.single_transformer_blocks = ModuleList(singles)
        self.proj_out = nn.Linear(dim, config.in_channels, bias=False)
        for table, (layer, rows, _) in TABLES.items():
            if folded_steps is None:
                made = ModuleDict({"linear": nn.Linear(dim, rows * dim, bias=False)})
                self.add_module(layer.removesuffix(".linear"), made)
            else:
                self.register_buffer(table, torch.empty(folded_steps, rows, dim))
        if folded_steps is None:
            self.time_guidance_embed = ModuleDict({"timestep_embedder": SinusoidEmbedder(dim, bias=False)})
            self.time_sign_embed = time_sign(config, dim)

    # -- time -----------------------------------------------------------------------------------

    def embed_time(self, t: Tensor, tt: Tensor) -> Tensor:
        """Return temb [B, dim] float32 of t = tt [B]."""
        t, _ = self.times(t, tt)
        return signed(self.time_guidance_embed["timestep_embedder"](TIME_SCALE * t), self.time_sign_embed)

    def _rows(self, table: str, temb: Tensor) -> Tensor:
        """Return the rows [B, R, dim] of a table."""
        layer, _, scales = TABLES[table]
        rows = modulation_rows(self.get_submodule(layer), temb, scales)  # type: ignore[arg-type]
        return rows.flip(1) if table == "final_table" else rows

    def modulate(self, t: Tensor, tt: Tensor) -> Modulation:
        """Return the constants at times t = tt ([B], in [0, 1])."""
        temb = self.embed_time(t, tt)
        return Modulation(Constants.of(self._rows(table, temb)) for table in TABLES)

    def fold(self, t: Tensor, tt: Tensor, resident: Resident) -> Iterator[tuple[str, Tensor]]:
        with resident("time_guidance_embed", "time_sign_embed"):
            temb = self.embed_time(t, tt)
        for table, (layer, *_) in TABLES.items():
            with resident(layer):
                yield table, self._rows(table, temb)

    def step_modulation(self, step: int) -> Modulation:
        return Modulation(Constants.of(self.get_buffer(table)[step : step + 1]) for table in TABLES)

    # -- network --------------------------------------------------------------------------------

    def encode_context(self, prompt_embeds: Tensor, lengths: Sequence[int] | Tensor) -> Context:
        """Return the prompts after `context_embedder`. Every row of prompt_embeds [B, L, joint_attention_dim] counts,
        as in the reference: lengths must all be L (on the device they are not looked at)."""
        counts = all_rows(prompt_embeds, lengths, "FLUX.2")
        return Context(self.context_embedder(prompt_embeds), counts)

    def patches(self, latents: Tensor, modulation: Modulation, context: Context) -> tuple[Tensor, float]:
        (height, width), ops, (img, txt, single, final) = latents.shape[2:], self.ops, modulation
        x, c = self.x_embedder(latents.flatten(2).transpose(1, 2)), context.tokens.to(latents.dtype)
        n, rope = x.shape[1], self._rope(height, width, c.shape[1], x.device)
        blocks, ones = self.transformer_blocks, self.single_transformer_blocks
        singles = [one.attn.to_qkv_mlp_proj for one in ones]
        readers: list[Readers] = [(block.attn.to_qkv, block.attn.add_qkv) for block in blocks]
        image = x, ops_for(readers[0][0], ops).layer_norm(x, img.scale_a, EPS, img.shift_a)
        prompt = c, ops_for(readers[0][1], ops).layer_norm(c, txt.scale_a, EPS, txt.shift_a)
        for i, block in enumerate(blocks):
            last = i + 1 == len(blocks)  # what follows reads both streams as one
            after, readers_after = ((single, single), (None, None)) if last else ((img, txt), readers[i + 1])
            image, prompt = block(image, prompt, (img, txt), after, rope, ops, readers_after)
        x, h = (torch.cat(pair, 1) for pair in zip(image, prompt, strict=True))
        for i, one in enumerate(ones):
            last = i + 1 == len(singles)
            after_one, reader = (final, self.proj_out) if last else (single, singles[i + 1])
            x, h = one(x, h, single.gate_a, after_one, rope, n if last else None, ops, reader)
        return channels_first(self.proj_out(h), height, width, 1), 1.0

    def _rope(self, height: int, width: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos, sin [1, height*width + length, head_dim/2] float32: an image token sits at (0, row, column, 0),
        prompt token j at (0, 0, 0, j). Angles are float64 as in the reference."""
        rows = torch.arange(height, device=device).repeat_interleave(width)
        ids = torch.zeros(height * width + length, 4, dtype=torch.float64, device=device)
        ids[: height * width, 1], ids[: height * width, 2] = rows, torch.arange(width, device=device).repeat(height)
        ids[height * width :, 3] = torch.arange(length, device=device)
        angles = []
        for axis, dim in enumerate(self.config.axes_dims_rope):
            exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
            angles.append(torch.outer(ids[:, axis], 1.0 / self.config.rope_theta**exponents))
        joint = torch.cat(angles, 1)[None]
        return joint.cos().float(), joint.sin().float()


LAYOUT = Layout(JOINT_FUSED, (), float32_where(".norm_"))
