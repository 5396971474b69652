"""What the package registers with torch."""

from __future__ import annotations

import torch

from twinflow_rt.ops.implementations import IMPLEMENTATIONS, QUANTIZED_OPS

# the ops of networks that csrc/ has for either device
NATIVE = tuple(
    op for op, some in IMPLEMENTATIONS.items() if {"native", "cuda"} <= set(some) and op not in QUANTIZED_OPS
)


def registered(implementation: str) -> set[str]:
    """Names of the ops under `twinflow::` that Triton's launchers ("triton") or csrc's ("native") are, all loaded."""
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("twinflow::")}
    return {n.split(".")[0] for n in names if n.startswith("triton_") == (implementation == "triton")}
