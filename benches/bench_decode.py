"""From the VAE's output to bytes; see op_suite.py."""

from __future__ import annotations

from benches.op_suite import suite

test_decode = suite("to_uint8")
