"""Qwen3 as a prompt encoder: the layers below `hidden_states[-2]`, no cache, no head (transformers: Qwen3Model).

Prompts are padded on the right and attention is causal, so a real token never sees padding: no
mask is needed, and a prompt's embedding does not depend on what it is batched with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import EAGER
from ..passes.load import Checkpoint, Layout
from ..stage import Model

FUSED = {
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


@dataclass(frozen=True)
class Qwen3Config:
    """The fields of text_encoder/config.json that shape the network; `depth` counts all its layers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float = 1e-6
    rope_theta: float = 1e6

    @classmethod
    def from_dict(cls, raw: dict) -> Qwen3Config:
        """Builds from config.json's content; variants that this encoder lacks are refused."""
        if raw.get("model_type", "qwen3") != "qwen3":
            raise ConfigError(f"text_encoder/config.json says model_type {raw['model_type']!r}, not 'qwen3'")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        sliding = raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ())
        if kind != "default" or sliding or raw.get("attention_bias") or raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(
                "text_encoder/config.json asks for scaled rope, sliding windows, attention biases or another "
                "activation; released Qwen3 encoders use none of them"
            )
        try:
            return cls(
                raw["vocab_size"], raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"],
                raw["num_attention_heads"], raw["num_key_value_heads"],
                raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
                raw.get("rms_norm_eps", 1e-6), rope.get("rope_theta") or raw.get("rope_theta", 1e6),
            )  # fmt: skip
        except KeyError as error:
            raise ConfigError(f"text_encoder/config.json lacks {error}; it is no Qwen3 configuration") from None


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (x[i], x[i + D/2]); x: [B, S, H, D], cos and sin: float32 [S, 1, D/2]. One rounding."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Weight(nn.Module):
    """One parameter, `weight`, to be loaded: a norm's or an embedding's, under the checkpoint's name.

    (nn.Embedding would initialise itself, which on the meta device imports torch's compiler: 2 s.)
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.split = tuple(h * config.head_dim for h in (config.heads, config.kv_heads, config.kv_heads))
        self.head_dim, self.eps, self.grouped = config.head_dim, config.eps, config.heads != config.kv_heads
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.split), bias=False)
        self.o_proj = nn.Linear(self.split[0], config.hidden_size, bias=False)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], ops) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv_proj(x).split(self.split, -1))
        q = rotate_halves(ops.rms_norm(q, self.q_norm.weight.float(), self.eps), *rope)
        k = rotate_halves(ops.rms_norm(k, self.k_norm.weight.float(), self.eps), *rope)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class Layer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = Weight(config.hidden_size)
        self.post_attention_layernorm = Weight(config.hidden_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], ops) -> Tensor:
        x = x + self.self_attn(ops.rms_norm(x, self.input_layernorm.weight.float(), self.eps), rope, ops)
        h = ops.rms_norm(x, self.post_attention_layernorm.weight.float(), self.eps)
        return x + self.mlp.down_proj(ops.swiglu(self.mlp.gate_up_proj(h)))


class Qwen3Encoder(nn.Module):
    """ids [B, L] int64 -> [B, L, hidden_size]: what enters the last of `config.depth` layers.

    That is transformers' `hidden_states[-2]`; the last layer and the closing norm are never built.
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config, self.ops = config, EAGER
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth - 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed_tokens.weight)
        exponents = torch.arange(0, self.config.head_dim, 2, device=ids.device).float() / self.config.head_dim
        angles = torch.arange(ids.shape[1], device=ids.device).float()[:, None] / self.config.rope_theta**exponents
        rope = angles.cos()[:, None], angles.sin()[:, None]
        for layer in self.layers:
            x = layer(x, rope, self.ops)
        return x


def layout(config: Qwen3Config) -> Layout:
    """The language-model head, the last layer and the closing norm feed nothing here; norms stay float32."""
    unused = ("lm_head.", f"layers.{config.depth - 1}.", "norm.")
    return Layout(FUSED, unused, lambda name, dtype: torch.float32 if "norm" in name else dtype)


# Qwen3ForCausalLM stores Qwen3Model under `model.`
MODEL = Model(Qwen3Config, Qwen3Encoder, layout, lambda folder: Checkpoint(folder, strip="model."))
