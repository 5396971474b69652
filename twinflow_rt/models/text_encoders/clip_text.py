"""CLIP's text tower as a prompt encoder (transformers: CLIPTextModelWithProjection).

Two results: what enters the last layer, for every token, and the projected state of the first end token behind the
closing norm. Prompts are padded to the positions the model has, and the padding counts, as in the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ...ops import EAGER, OpTable, ops_for
from ..architecture import Architecture
from ..layers import ModuleDict, ModuleList
from .language_model import Weight, embed

FUSED = {
    f"self_attn.qkv_proj.{leaf}": tuple(f"self_attn.{part}_proj.{leaf}" for part in "qkv")
    for leaf in ("weight", "bias")
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
LEGACY_END = 2  # what old files call the end token, wrongly: theirs is the highest id of a prompt


@dataclass(frozen=True)
class ClipConfig:
    """The fields of config.json that shape the network; defaults are transformers'."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ClipConfig:
        """Build from config.json's content. Raises ConfigError for another model's."""
        if raw.get("model_type") != "clip_text_model":
            raise ConfigError(f"config.json says model_type {raw.get('model_type')!r}, not 'clip_text_model'")
        config = cls(**{name: raw[name] for name in cls.__dataclass_fields__ if name in raw})
        if config.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"config.json: activation {config.hidden_act!r}; CLIP has one of {known}")
        return config


class Norm(nn.Module):
    """LayerNorm with weight and bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, eps: float, ops: OpTable) -> Tensor:
        return ops.layer_norm(x, self.weight.float(), eps, self.bias.float())


class Attention(nn.Module):
    def __init__(self, config: Any, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = config.num_attention_heads, causal
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm layer; config has the fields of `ClipConfig` that it needs."""

    def __init__(self, config: Any, causal: bool = True) -> None:
        super().__init__()
        width = config.hidden_size
        self.eps, self.act = config.layer_norm_eps, ACTIVATIONS[config.hidden_act]
        self.self_attn = Attention(config, causal)
        self.layer_norm1, self.layer_norm2 = Norm(width), Norm(width)
        self.mlp = ModuleDict(
            {"fc1": nn.Linear(width, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, width)}
        )

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        first, second = self.mlp.values()
        x = x + self.self_attn(self.layer_norm1(x, self.eps, ops_for(self.self_attn.qkv_proj, ops)))
        return x + second(self.act(first(self.layer_norm2(x, self.eps, ops_for(first, ops)))))


class ClipText(nn.Module):
    """Tokens [B, max_position_embeddings] int64 to states [B, L, hidden_size] and pooled states [B, projection_dim]."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config, self.ops = config, EAGER
        self.embeddings = ModuleDict(
            {
                "token_embedding": Weight(config.vocab_size, config.hidden_size),
                "position_embedding": Weight(config.max_position_embeddings, config.hidden_size),
            }
        )
        self.encoder = ModuleDict({"layers": ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        self.final_layer_norm = Norm(config.hidden_size)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens, positions = (e.weight for e in self.embeddings.values())
        x = embed(ids, tokens) + positions[: ids.shape[1]]
        *layers, last = self.encoder["layers"]
        for layer in layers:
            x = layer(x, self.ops)
        end = self.config.eos_token_id
        first_end = (ids if end == LEGACY_END else (ids == end).int()).argmax(-1)
        states = last(x, self.ops)[torch.arange(len(ids), device=ids.device), first_end]
        pooled = self.final_layer_norm(states[:, None], self.config.layer_norm_eps, self.ops)[:, 0]
        return x, self.text_projection(pooled)


MODEL = Architecture(
    ClipConfig, ClipText, lambda config: Layout(FUSED, ("embeddings.position_ids",), float32_where("norm")),
    ("text_model.",),
)  # fmt: skip
