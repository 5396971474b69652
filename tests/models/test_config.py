"""Text encoders' config.json: rotary frequencies as transformers reads them."""

from __future__ import annotations

from copy import deepcopy

import pytest
from transformers import AutoConfig

from twinflow_rt.errors import ConfigError
from twinflow_rt.models.text_encoders import clip_text, gemma2, openuni, qwen2_5_vl, qwen3, t5

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
ENCODERS = {
    "qwen3": qwen3.MODEL, "qwen2_5_vl_text": qwen2_5_vl.MODEL, "qwen2": openuni.LANGUAGE, "gemma2": gemma2.MODEL
}  # fmt: skip
LEGAL = [
    {}, {"rope_theta": 5e5}, {"rope_parameters": None}, {"rope_parameters": {}},
    {"rope_scaling": None, "rope_theta": 7e5}, {"rope_parameters": {}, "rope_theta": 5e5}, 
    {"rope_parameters": {"rope_theta": 3e5}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100}}, {"rope_parameters": {"rope_type": "default"}},
]  # fmt: skip
ILLEGAL = [
    *({"rope_theta": value} for value in (0, -1, -1e6, float("nan"), float("inf"), "1e6", [1e6], True, {})),
    *({"rope_parameters": {"rope_theta": value}} for value in (0, -1, float("nan"), "10", [])),
    *({key: value} for key in ("rope_parameters", "rope_scaling") for value in ([], [1], "", 0, False, "default")),
    {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, {"rope_parameters": {"rope_type": None}},
    {"rope_parameters": {"partial_rotary_factor": 0.5}}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "default"}},
]  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("rope", LEGAL, ids=str)
def test_rotary_base_is_transformers(kind, rope):
    reference = AutoConfig.for_model(kind, **SIZES, **deepcopy(rope))  # which it changes
    network, _ = ENCODERS[kind].declare({"model_type": kind, **SIZES, **rope})
    assert network.config.rope_theta == reference.rope_parameters["rope_theta"]


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("rope", ILLEGAL, ids=str)
def test_rotary_settings_that_cannot_work_are_named(kind, rope):
    with pytest.raises(ConfigError, match=r"rope|partial_rotary_factor") as caught:
        ENCODERS[kind].declare({"model_type": kind, **SIZES, **rope})
    assert "config.json" in str(caught.value)


NUMBERS = [
    *((gemma2.MODEL, "gemma2", {name: value}) for name in ("query_pre_attn_scalar", "attn_logit_softcapping",
      "sliding_window", "head_dim") for value in (0, -4, "8")),
    *((qwen3.MODEL, "qwen3", {"head_dim": value}) for value in (0, -8, "8")),
    *((qwen3.MODEL, "qwen3", {"rms_norm_eps": value}) for value in (-1e-6, "1e-6", float("nan"))),
    *((clip_text.MODEL, "clip_text_model", {"layer_norm_eps": value}) for value in (-1e-5, float("inf"))),
    *((t5.MODEL, "t5", {"relative_attention_num_buckets": value}) for value in (0, -32, 1, 3, "32")),
    *((t5.MODEL, "t5", {"relative_attention_max_distance": value}) for value in (0, -1, 7, 8, 8.5)),
]  # fmt: skip


@pytest.mark.parametrize(("model", "kind", "change"), NUMBERS, ids=[f"{kind} {change}" for _, kind, change in NUMBERS])
def test_numbers_that_cannot_work_are_named(model, kind, change):
    sizes = {**SIZES, "d_model": 32, "feed_forward_proj": "gated-gelu", "projection_dim": 8}
    with pytest.raises(ConfigError, match=next(iter(change)).rpartition("_")[2]):
        model.declare({"model_type": kind, **sizes, **change})
