"""The language model of Qwen2.5-VL as a prompt encoder: its last hidden state, closing norm included.

A prompt without images has the same position on all three axes of M-RoPE, which is then plain RoPE.
The vision tower and the head stay in the files.
"""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ..architecture import Architecture
from ..config import rope_theta
from .language_model import LanguageConfig, LanguageModel, layout

# where files keep the language model: transformers since 4.52; before that; saved on its own
PREFIXES = ("model.language_model.", "model.", "language_model.")


class Qwen25VLConfig(LanguageConfig):
    """text_encoder/config.json of transformers' Qwen2_5_VLForConditionalGeneration."""

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> LanguageConfig:
        """Build from config.json's content. Fields of the language model stand in `text_config`, in older files
        beside it. Raises ConfigError for variants that this encoder lacks."""
        if raw.get("model_type") not in ("qwen2_5_vl", "qwen2_5_vl_text"):
            raise ConfigError(f"text_encoder/config.json says model_type {raw.get('model_type')!r}, not 'qwen2_5_vl'")
        tie = {k: raw[k] for k in ("tie_word_embeddings",) if k in raw}  # of the head, so of the whole model
        raw = {**raw, **{k: v for k, v in (raw.get("text_config") or {}).items() if v is not None}, **tie}
        theta = rope_theta(raw, 1e6, ("default", "mrope"))
        return cls.read(raw, "Qwen2.5-VL", theta, qkv_bias=True, qk_norm=False, state=-1)


MODEL = Architecture(Qwen25VLConfig, LanguageModel, layout, PREFIXES)
