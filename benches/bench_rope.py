"""QK RMSNorm + rotary embedding; see op_suite.py."""

from __future__ import annotations

from benches.op_suite import suite

test_rope = suite("qk_norm_rope", "joint_qk_norm_rope")
