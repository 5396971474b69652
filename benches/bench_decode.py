"""From the last velocity through the VAE to bytes; see op_suite.py."""

from __future__ import annotations

from benches.op_suite import suite

test_decode = suite("x0_to_vae", "group_norm_silu", "rms_norm_silu", "upsample_conv", "to_uint8")
