"""Activations of the feed-forward blocks; see op_suite.py."""

from __future__ import annotations

from benches.op_suite import suite

test_mlp = suite(
    "swiglu", "gelu_tanh", "linear_swiglu", "linear_gelu", "linear_residual", "swiglu_quantized", "gelu_tanh_quantized"
)  # fmt: skip
