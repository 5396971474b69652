"""OpenUni's language model, and what stands between it and SANA: learned queries, connector, projector.

The language model (that of InternVL3, a Qwen2) reads a prompt and then `num_queries` learned embeddings; its last
hidden states there pass the connector, a small bidirectional encoder, and a linear layer to become SANA's prompt
embeddings. OpenUni's own files have these tensors as `meta_queries`, `connector.*`, `projector.*`; here they are a
folder `connector/` of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.layout import Layout, float32_where
from ...errors import ConfigError
from ...ops import EAGER
from ..architecture import Architecture
from ..config import rope_theta
from ..layers import ModuleDict, ModuleList
from .clip_text import FUSED, Layer
from .language_model import LanguageConfig, LanguageModel, layout


@dataclass(frozen=True)
class ConnectorConfig:
    """connector/config.json; defaults are OpenUni-L with InternVL3 2B and SANA 1.6B at 512 pixels."""

    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 6
    num_attention_heads: int = 24
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    num_queries: int = 256
    caption_channels: int = 2304

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ConnectorConfig:
        """Build from config.json's content. Raises ConfigError for another activation."""
        config = cls(**{name: raw[name] for name in cls.__dataclass_fields__ if name in raw})
        if config.hidden_act != "gelu_pytorch_tanh":
            raise ConfigError(f"connector/config.json: activation {config.hidden_act!r}; OpenUni has gelu_pytorch_tanh")
        return config


class Connector(nn.Module):
    """Hidden states at the queries [B, Q, hidden_size] to prompt embeddings [B, Q, caption_channels]."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config, self.ops = config, EAGER
        self.meta_queries = nn.Parameter(torch.empty(config.num_queries, config.hidden_size))
        layers = ModuleList(Layer(config, causal=False) for _ in range(config.num_hidden_layers))
        self.connector = ModuleDict({"layers": layers})
        self.projector = nn.Linear(config.hidden_size, config.caption_channels)

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.connector["layers"]:
            states = layer(states, self.ops)
        return self.projector(states)


class InternVLConfig(LanguageConfig):
    """text_encoder/config.json: of InternVL3, whose language model stands in `llm_config`, or of that alone."""

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> LanguageConfig:
        if raw.get("model_type") == "internvl_chat":
            raw = raw.get("llm_config") or {}
        if raw.get("model_type") != "qwen2":
            raise ConfigError(
                f"text_encoder/config.json says model_type {raw.get('model_type')!r}; OpenUni's language model is "
                "a 'qwen2', on its own or in 'internvl_chat'"
            )
        # InternVL3's is "dynamic", which changes nothing within the positions it was trained on (32768)
        theta = rope_theta(raw, 1e4, ("default", "dynamic"))
        positions = raw.get("max_position_embeddings", cls.positions)
        return cls.read(raw, "OpenUni", theta, qkv_bias=True, qk_norm=False, state=-1, positions=positions)


def _language_layout(config: LanguageConfig) -> Layout:
    base = layout(config)
    others = ("language_model.lm_head.", "vision_model.", "mlp1.")
    return Layout(base.fused, base.unused + others, base.dtype_of, base.absent, base.tied)


LANGUAGE = Architecture(InternVLConfig, LanguageModel, _language_layout, ("language_model.model.", "model."))
CONNECTOR = Architecture(ConnectorConfig, Connector, lambda config: Layout(FUSED, (), float32_where("norm")))
