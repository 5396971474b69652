"""Qwen3 as a prompt encoder: `hidden_states[-2]`, so its last layer and closing norm are never built; or for FLUX.2
three states from its middle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import ConfigError
from ..architecture import Architecture
from ..config import rope_theta
from .language_model import LanguageConfig, LanguageModel, layout


class Qwen3Config(LanguageConfig):
    """text_encoder/config.json of transformers' Qwen3Model."""

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> LanguageConfig:
        """Build from config.json's content. Raises ConfigError for variants that this encoder lacks."""
        if raw.get("model_type", "qwen3") != "qwen3":
            raise ConfigError(f"text_encoder/config.json says model_type {raw['model_type']!r}, not 'qwen3'")
        if raw.get("attention_bias"):
            raise ConfigError("text_encoder/config.json asks for attention biases; Qwen3 encoders have none")
        return cls.read(raw, "Qwen3", rope_theta(raw, 1e4))


class Flux2Qwen3Config(Qwen3Config):
    """The same, of which FLUX.2 reads these states."""

    STATES = (9, 18, 27)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> LanguageConfig:
        config = super().from_dict(raw)
        if config.depth < cls.STATES[-1]:
            raise ConfigError(
                f"text_encoder/config.json has {config.depth} layers; FLUX.2 reads what leaves number {cls.STATES[-1]}"
            )
        return replace(config, states=cls.STATES)


# Qwen3ForCausalLM stores Qwen3Model under `model.`
MODEL = Architecture(Qwen3Config, LanguageModel, layout, ("model.",))
FLUX2 = Architecture(Flux2Qwen3Config, LanguageModel, layout, ("model.",))
