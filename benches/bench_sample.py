"""The closing step of the sampler; see op_suite.py."""

from __future__ import annotations

from benches.op_suite import suite

test_sample = suite("x0_project")
