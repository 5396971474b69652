"""Gemma 2 as a prompt encoder: its last hidden state, behind the closing norm (transformers: Gemma2Model).

Sandwich norms with weights 1 + w, scores soft-capped at c (c * tanh(s / c)), a GELU-gated MLP, grouped keys. Sliding
windows are far longer than any prompt here, so they are not built. Causal, as the other encoders: padding on the right
changes nothing (see `language_model`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ...ops import EAGER, OpTable, ops_for
from ..architecture import Architecture
from ..config import rope_theta
from ..layers import Module, ModuleList
from .language_model import FUSED, FeedForward, Past, Weight, after, embed, tied

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


@cache
def rounded(number: float, dtype: torch.dtype) -> float:
    """Return a number as `dtype` has it."""
    return torch.tensor(number, dtype=dtype).item()


@dataclass(frozen=True)
class Gemma2Config:
    """The fields of text_encoder/config.json that shape the network; defaults are those of Gemma 2 2B."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = 50.0
    sliding_window: int = 4096
    rope_theta: float = 10000.0
    tie_word_embeddings: bool | None = True

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Gemma2Config:
        """Build from config.json's content. Raises ConfigError for another model's."""
        if raw.get("model_type") != "gemma2":
            raise ConfigError(f"text_encoder/config.json says model_type {raw.get('model_type')!r}; SANA has 'gemma2'")
        if raw.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh" or raw.get("attention_bias"):
            raise ConfigError("text_encoder/config.json asks for another activation than gelu_pytorch_tanh, or biases")
        given = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        return cls(**{**given, "rope_theta": rope_theta(raw, cls.rope_theta)})


class Attention(Module):
    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale, self.cap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
        width = (self.heads + 2 * self.kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(self.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], ops: OpTable, past: tuple[Tensor, Tensor] | None,
        kept: list[tuple[Tensor, Tensor]] | None,
    ) -> Tensor:  # fmt: skip
        qkv = self.qkv_proj(x)
        q, k, v = ops.grouped_qk_norm_rope(qkv, None, None, *rope, self.heads, self.kv_heads, 0.0)
        q = q.unflatten(1, (self.kv_heads, -1))  # [B, kv heads, queries per key, L, D]
        if kept is not None:
            kept.append((k.contiguous(), v.contiguous()))
        k, v, seen = after(past, k, v)
        if seen is None:
            seen = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril()
        k, v = k[:, :, None], v[:, :, None]
        scores = (q @ k.transpose(-1, -2)).float() * self.scale
        if self.cap is not None:
            scores = self.cap * (scores / self.cap).tanh()
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype)
        return self.o_proj((weights @ v).permute(0, 3, 1, 2, 4).flatten(2))


class Layer(Module):
    input_layernorm: Weight

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), FeedForward(config)
        for name in NORMS:
            setattr(self, name, Weight(config.hidden_size))

    def forward(
        self, x: Tensor, h: Tensor, rope: tuple[Tensor, Tensor], following: Tensor, eps: float, ops: Any,
        past: tuple[Tensor, Tensor] | None, kept: list[tuple[Tensor, Tensor]] | None, reader: nn.Module | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return x after the layer, and x under the norm of weight `following` for `reader`, the layer that reads it.
        h: x under this layer's first norm."""
        _, post_a, pre_f, post_f = (1 + getattr(self, name).weight.float() for name in NORMS)
        branch = self.self_attn(h, rope, ops, past, kept)
        x, h = ops_for(self.mlp.gate_up_proj, ops).residual_norm(x, branch, post_a, pre_f, eps)
        gate, up = self.mlp.gate_up_proj(h).chunk(2, -1)
        branch = self.mlp.down_proj(ops.gelu_tanh(gate) * up)
        return ops_for(reader, ops).residual_norm(x, branch, post_f, following, eps)


class Gemma2(nn.Module):
    """Tokens [B, L] int64 to the last hidden state [B, L, hidden_size]."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config, self.ops = config, EAGER
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)

    def forward(self, ids: Tensor, past: Past | None = None) -> Tensor:
        """Return the states of these tokens. past: of the P before them; positions then begin at P."""
        return self._run(ids, past, None)

    def read(self, ids: Tensor) -> tuple[Tensor, Past]:
        """Return the states [1, P, hidden_size] of a beginning, ids [1, P], and its past for the tokens behind it."""
        kept: list[tuple[Tensor, Tensor]] = []
        return self._run(ids, None, kept), tuple(kept)

    def blank_past(self, length: int) -> Past:
        """Return a past of `length` tokens without values, on the weights' device, for counting."""
        config, weight = self.config, self.embed_tokens.weight
        return tuple(
            (weight.new_empty(shape), weight.new_empty(shape))
            for shape in [(1, config.num_key_value_heads, length, config.head_dim)] * config.num_hidden_layers
        )

    def _run(self, ids: Tensor, past: Past | None, kept: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        config, device = self.config, ids.device
        start = past[0][0].shape[2] if past else 0
        length = start + ids.shape[1]
        if length > config.sliding_window:
            raise ConfigError(f"a prompt of {length} tokens exceeds the window of {config.sliding_window}; shorten it")
        weight = self.embed_tokens.weight
        x = embed(ids, weight) * rounded(config.hidden_size**0.5, weight.dtype)
        exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
        angles = torch.arange(start, length, device=device).float()[:, None] / config.rope_theta**exponents
        rope = angles.cos()[None], angles.sin()[None]
        firsts = [1 + layer.input_layernorm.weight.float() for layer in self.layers] + [1 + self.norm.weight.float()]
        readers = [*(layer.self_attn.qkv_proj for layer in self.layers), None]
        h = ops_for(readers[0], self.ops).rms_norm(x, firsts[0], config.rms_norm_eps)
        each = zip(self.layers, firsts[1:], readers[1:], strict=True)
        for i, (layer, following, reader) in enumerate(each):
            before = past[i] if past else None
            x, h = layer(x, h, rope, following, config.rms_norm_eps, self.ops, before, kept, reader)
        return h


# Gemma2ForCausalLM stores Gemma2Model under `model.`
MODEL = Architecture(
    Gemma2Config, Gemma2,
    lambda config: Layout(FUSED, ("lm_head.",), float32_where("norm"), tied=tied(config.tie_word_embeddings)),
    ("model.",),
)  # fmt: skip
