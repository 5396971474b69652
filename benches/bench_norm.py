"""The norm family; see op_suite.py."""

from __future__ import annotations

from benches.op_suite import suite

NORMS = ("rms_norm", "layer_norm", "residual_norm", "residual_layer_norm")
test_norm = suite(*NORMS, *(f"{op}_quantized" for op in NORMS))
