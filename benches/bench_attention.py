"""Attention; see op_suite.py."""

from __future__ import annotations

from benches.op_suite import suite

test_attention = suite("attention", "linear_attention", "attention_fp8")
