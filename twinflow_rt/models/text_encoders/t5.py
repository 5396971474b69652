"""T5's encoder (version 1.1: gated GELU) as a prompt encoder (transformers: T5EncoderModel).

No mask: prompts are padded to one length and the padding counts, as in the reference. Scores are not scaled, and get a
bias by relative position, of which the first layer holds the only table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout
from ...errors import ConfigError
from ...ops import EAGER, OpTable
from ..architecture import Architecture
from ..layers import ModuleDict, ModuleList, with_residual
from .language_model import Weight, embed

FUSED = {
    "SelfAttention.qkv.weight": ("SelfAttention.q.weight", "SelfAttention.k.weight", "SelfAttention.v.weight"),
    "DenseReluDense.wi.weight": ("DenseReluDense.wi_0.weight", "DenseReluDense.wi_1.weight"),
}
SHARED = ("embed_tokens.weight", "decoder.embed_tokens.weight")  # the encoder's and decoder's names of shared.weight


@dataclass(frozen=True)
class T5Config:
    """The fields of text_encoder_3/config.json that shape the encoder; defaults are transformers'."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> T5Config:
        """Build from config.json's content. Raises ConfigError for another model's."""
        if raw.get("model_type") != "t5" or raw.get("feed_forward_proj") != "gated-gelu":
            raise ConfigError(
                f"config.json says model_type {raw.get('model_type')!r}, feed_forward_proj "
                f"{raw.get('feed_forward_proj')!r}; expected is T5 1.1, 't5' with 'gated-gelu'"
            )
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__ if name in raw})


class SelfAttention(nn.Module):
    def __init__(self, config: T5Config, biased: bool) -> None:
        super().__init__()
        inner, self.heads = config.num_heads * config.d_kv, config.num_heads
        self.qkv = nn.Linear(config.d_model, 3 * inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if biased:
            self.relative_attention_bias = Weight(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return attention up to `o`, which the block applies as it adds. bias: [1, heads, L, L], added to scores."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return out.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, config: T5Config, biased: bool) -> None:
        super().__init__()
        self.eps = config.layer_norm_epsilon
        dense = {
            "wi": nn.Linear(config.d_model, 2 * config.d_ff, bias=False),
            "wo": nn.Linear(config.d_ff, config.d_model, bias=False),
        }
        first = {"SelfAttention": SelfAttention(config, biased), "layer_norm": Weight(config.d_model)}
        second = {"DenseReluDense": ModuleDict(dense), "layer_norm": Weight(config.d_model)}
        self.layer: ModuleList[ModuleDict[Any]] = ModuleList((ModuleDict(first), ModuleDict(second)))

    def forward(self, x: Tensor, bias: Tensor, dtype: torch.dtype, ops: OpTable) -> Tensor:
        """Return x after the block. dtype: what the network is stored in; x may be wider, see `_dtype_of`."""
        attention, norm = self.layer[0].values()
        out = attention(ops.rms_norm(x, norm.weight.float(), self.eps).to(dtype), bias)
        x = with_residual(x, attention.o, out, ops)
        dense, norm = self.layer[1].values()
        gate, up = dense["wi"](ops.rms_norm(x, norm.weight.float(), self.eps).to(dtype)).chunk(2, -1)
        wide = _dtype_of("wo.weight", dtype)
        return with_residual(x, dense["wo"], (ops.gelu_tanh(gate) * up).to(wide), ops)


class T5Encoder(nn.Module):
    """Tokens [B, L] int64 to states [B, L, d_model] behind the closing norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        if buckets < 4 or distance <= buckets // 4:  # of each direction's half, half count positions one by one
            raise ConfigError(
                f"config.json: relative_attention_num_buckets {buckets} and relative_attention_max_distance {distance} "
                "leave no logarithmic buckets; download it again"
            )
        self.config, self.ops = config, EAGER
        self.shared = Weight(config.vocab_size, config.d_model)
        self.block = ModuleList(Block(config, i == 0) for i in range(config.num_layers))
        self.final_layer_norm = Weight(config.d_model)

    def forward(self, ids: Tensor) -> Tensor:
        x, bias = embed(ids, self.shared.weight), self._bias(ids.shape[1])
        dtype = x.dtype
        for block in self.block:
            x = block(x, bias, dtype, self.ops)
        return self.ops.rms_norm(x, self.final_layer_norm.weight.float(), self.config.layer_norm_epsilon).to(dtype)

    def _bias(self, length: int) -> Tensor:
        """Return the bias [1, heads, length, length] of scores. Half of the buckets are for keys ahead, half for those
        behind; of either, half count positions one by one and half on a logarithmic scale up to the maximum."""
        table = self.block[0].layer[0]["SelfAttention"].relative_attention_bias.weight
        positions = torch.arange(length, device=table.device)
        offset = positions - positions[:, None]
        half = self.config.relative_attention_num_buckets // 2
        exact, distance = half // 2, offset.abs()
        growth = (distance.clamp(min=1).float() / exact).log() / math.log(
            self.config.relative_attention_max_distance / exact
        )
        coarse = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
        bucket = torch.where(distance < exact, distance, coarse) + half * (offset > 0)
        return F.embedding(bucket, table).permute(2, 0, 1)[None]


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return float32 for norms, and for `wo` where others are float16, whose range its results exceed; else `dtype`."""
    wide = "norm" in name or (dtype == torch.float16 and name.endswith("wo.weight"))
    return torch.float32 if wide else dtype


MODEL = Architecture(
    T5Config, T5Encoder,
    lambda config: Layout(FUSED, ("embed_tokens.", "decoder.", "lm_head."), _dtype_of, tied={"shared.weight": SHARED}),
    ("encoder.",),
)  # fmt: skip
