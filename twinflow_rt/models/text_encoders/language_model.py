"""Causal language models as prompt encoders: no cache, no head, no layer that nothing reads.

Prompts are padded on the right and attention is causal, so a real token never sees padding: no mask is needed, and a
prompt's embedding does not depend on what it is batched with. For the same reason a beginning that all prompts share
is read only once: later tokens take from it its keys and values in every layer (`Past`). A padding token whose state is
wanted all the same (FLUX.2) sees the real tokens alone. Modules have the names that transformers gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ...ops import EAGER, OpTable, ops_for
from ...ops.tracing import TableCache
from ..layers import Module, ModuleList, with_residual, with_swiglu

FUSED = {
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "self_attn.qkv_proj.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}

# keys and values of tokens that came before, per layer, each [1, heads, P, head_dim], rotated
Past = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class LanguageConfig:
    """The fields of text_encoder/config.json that shape the network; `depth` counts all its layers.

    qkv_bias: biases on queries, keys and values. qk_norm: RMS norms of queries and keys, per head. state: which of
    transformers' hidden_states is wanted: -2, what enters the last layer, or -1, what leaves the closing norm. states:
    numbers of those that are wanted side by side instead, ascending, each what enters the layer of its number. tie:
    tie_word_embeddings, see `tied`. positions: tokens that the model was made for; a longer text is read all the same.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float = 1e-6
    rope_theta: float = 1e6
    qkv_bias: bool = False
    qk_norm: bool = True
    state: int = -2
    states: tuple[int, ...] = ()
    tie: bool | None = True
    positions: int = 32768

    @classmethod
    def read(cls, raw: dict[str, Any], name: str, theta: float, **fixed: Any) -> LanguageConfig:
        """Build from the fields that all such models name alike. theta: base of the rotary frequencies. Raises
        ConfigError for an absent field."""
        if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ()):
            raise ConfigError(f"text_encoder/config.json asks for sliding windows; released {name} encoders have none")
        if raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"text_encoder/config.json: activation {raw['hidden_act']!r}; {name} has silu")
        try:
            own = raw.get("head_dim")
            return cls(
                raw["vocab_size"], raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"],
                raw["num_attention_heads"], raw["num_key_value_heads"],
                raw["hidden_size"] // raw["num_attention_heads"] if own is None else own,
                raw.get("rms_norm_eps", 1e-6), theta, tie=raw.get("tie_word_embeddings"), **fixed,
            )  # fmt: skip
        except KeyError as error:
            raise ConfigError(f"text_encoder/config.json lacks {error}; it is no {name} configuration") from None

    @property
    def layers(self) -> int:
        """Layers that are built."""
        return self.states[-1] if self.states else self.depth + self.state + 1

    @property
    def width(self) -> int:
        """Features of what the network returns of a token."""
        return self.hidden_size * max(len(self.states), 1)


def after(past: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return keys and values [B, H, P + L, D] with those of `past` in front, and their causal mask [L, P + L] (True: is
    seen); without a past k and v as they are, and None: the plain causal mask."""
    if past is None:
        return k, v, None
    before, new = past[0].shape[2], k.shape[2]
    k, v = (torch.cat((p.expand(len(x), -1, -1, -1), x), 2) for p, x in zip(past, (k, v), strict=True))
    return k, v, torch.ones(new, before + new, dtype=torch.bool, device=k.device).tril(before)


class Weight(nn.Module):
    """One parameter, `weight`: a norm's or an embedding's, under the checkpoint's name.

    nn.Embedding would initialise itself, which on the meta device imports torch's compiler and takes 2 s.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """Return the rows of `table` for tokens, on their device. While blocks stream through a GPU the table stays on the
    host (`runtime.streaming`), and only these rows cross the bus."""
    if table.device == ids.device:
        return F.embedding(ids, table)
    return F.embedding(ids.to(table.device), table).to(ids.device)


class Attention(Module):
    """Attention up to `o_proj`, which the layer applies as it adds to the residual stream."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.eps = config.heads, config.kv_heads, config.eps
        self.grouped = config.heads != config.kv_heads
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (Weight(config.head_dim) if config.qk_norm else None for _ in range(2))

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], ops: OpTable, past: tuple[Tensor, Tensor] | None,
        kept: list[tuple[Tensor, Tensor]] | None, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        weights = [None if norm is None else norm.weight.float() for norm in (self.q_norm, self.k_norm)]
        q, k, v = ops.grouped_qk_norm_rope(self.qkv_proj(x), *weights, *rope, self.heads, self.kv_heads, self.eps)
        if kept is not None:
            kept.append((k.contiguous(), v.contiguous()))
        k, v, behind = after(past, k, v)
        mask = behind if mask is None else mask
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.grouped)
        return out.transpose(1, 2).flatten(2)


class FeedForward(Module):
    """A gated MLP. config: anything with the two sizes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class Layer(Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = Weight(config.hidden_size)
        self.post_attention_layernorm = Weight(config.hidden_size)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], ops: OpTable, past: tuple[Tensor, Tensor] | None,
        kept: list[tuple[Tensor, Tensor]] | None, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        attention, gate_up, down = self.self_attn, self.mlp.gate_up_proj, self.mlp.down_proj
        h = ops_for(attention.qkv_proj, ops).rms_norm(x, self.input_layernorm.weight.float(), self.eps)
        x = with_residual(x, attention.o_proj, attention(h, rope, ops, past, kept, mask), ops)
        h = ops_for(gate_up, ops).rms_norm(x, self.post_attention_layernorm.weight.float(), self.eps)
        return with_residual(x, down, with_swiglu(gate_up, h, ops_for(down, ops)), ops)


class LanguageModel(Module):
    """Tokens [B, L] int64 to the hidden state [B, L, hidden_size] number `config.state`, or the `config.states`, [B, L,
    width]; nothing beyond is built."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config, self.ops = config, EAGER
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = Weight(config.hidden_size) if config.state == -1 and not config.states else None
        self._ropes = TableCache()

    def forward(self, ids: Tensor, past: Past | None = None, counts: Tensor | None = None) -> Tensor:
        """Return the states of these tokens. past: of the P before them; positions then begin at P. counts: int64 [B],
        tokens of each prompt that others see; None: all."""
        return self.encode(embed(ids, self.embed_tokens.weight), past, counts=counts)

    def read(self, ids: Tensor) -> tuple[Tensor, Past]:
        """Return the states [1, P, hidden_size] of a beginning, ids [1, P], and its past for the tokens behind it."""
        kept: list[tuple[Tensor, Tensor]] = []
        return self.encode(embed(ids, self.embed_tokens.weight), kept=kept), tuple(kept)

    def blank_past(self, length: int) -> Past:
        """Return a past of `length` tokens without values, on the weights' device, for counting."""
        config, weight = self.config, self.embed_tokens.weight
        return tuple(
            (weight.new_empty(shape), weight.new_empty(shape))
            for shape in [(1, config.kv_heads, length, config.head_dim)] * config.layers
        )

    def encode(
        self, x: Tensor, past: Past | None = None, kept: list[tuple[Tensor, Tensor]] | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the states of embeddings [B, L, hidden_size], of tokens or of anything in their place.

        kept: a list that each layer's keys and values are appended to.
        """
        start = past[0][0].shape[2] if past else 0
        end = start + x.shape[1]
        rope = self._ropes((start, end), x.device, lambda: self._rope(start, end, x.device))
        mask, found = None, []
        if counts is not None:
            mask = torch.ones(end, end, dtype=torch.bool, device=x.device).tril()
            mask = (mask & (torch.arange(end, device=x.device) < counts[:, None, None]))[:, None]
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, self.ops, past[i] if past else None, kept, mask)
            if i + 1 in self.config.states:
                found.append(x)
        if found:
            return torch.cat(found, -1)
        return x if self.norm is None else self.ops.rms_norm(x, self.norm.weight.float(), self.config.eps)

    def _rope(self, start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos, sin of positions start to end, [1, L, head_dim/2] float32."""
        exponents = torch.arange(0, self.config.head_dim, 2, device=device).float() / self.config.head_dim
        positions = torch.arange(start, end, device=device).float()[:, None]
        angles = positions / self.config.rope_theta**exponents
        return angles.cos()[None], angles.sin()[None]


def tied(tie_word_embeddings: bool | None) -> dict[str, tuple[str, ...]]:
    """Return `Layout.tied`: files may have the head's weight in place of the embeddings, unless config.json says that
    the two differ."""
    heads = ("lm_head.weight", "language_model.lm_head.weight")
    return {} if tie_word_embeddings is False else {"embed_tokens.weight": heads}


def untied(missing: set[str], tie_word_embeddings: bool | None) -> str | None:
    """Return `Layout.absent`'s reason where only embeddings are missing that the head is not."""
    if tie_word_embeddings is not False or missing != {"embed_tokens.weight"}:
        return None
    return (
        "embed_tokens.weight is missing, which by config.json (tie_word_embeddings: false) is not lm_head.weight; "
        "the file is incomplete, or the config of another model"
    )


def layout(config: LanguageConfig) -> Layout:
    """Return how files are read: not the head, a vision tower, or what follows `config.state`; norms stay float32."""
    closed = config.state == -1 and not config.states
    beyond = () if closed else (*(f"layers.{i}." for i in range(config.layers, config.depth)), "norm.")
    unused = ("lm_head.", "visual.", *beyond)
    return Layout(FUSED, unused, float32_where("norm"), lambda names: untied(names, config.tie), tied(config.tie))
