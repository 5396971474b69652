"""What else computes an op: the project's implementations, torch's own, and other libraries' where installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.ops.case import Case
from benches.ops.eight_bit_cases import implementations
from twinflow_rt import ops
from twinflow_rt.ops import Target
from twinflow_rt.ops.implementations import IMPLEMENTATIONS, RAGGED
from twinflow_rt.ops.optional import find

NAMES = ("eager", "compile", "torch", "liger")
LIGER = "liger_kernel.transformers.functional"


def ours(case: Case, target: Target) -> tuple[dict[str, Callable], dict[str, str]]:
    """The implementations that serve `target` here, and why the others do not."""
    return implementations(case, target, table_name(case))


def table_name(case: Case) -> str:
    """The key of `IMPLEMENTATIONS` a case belongs to."""
    return RAGGED if "ragged" in case.name else case.op


def others(op: str, args: tuple[Any, ...], without: Sequence[str] = ()) -> dict[str, Callable]:
    """Of `NAMES` less `without`: eager (the specification), compile (what replacing eager must beat),
    torch's fused operators, Liger.

    Weights in another dtype than the op's are converted here, not in the timed call.
    """
    reference = IMPLEMENTATIONS[op]["eager"].load()
    found: dict[str, Callable] = {"eager": reference}
    if "compile" not in without:
        found["compile"] = torch.compile(reference)
    if op in ("rms_norm", "layer_norm"):
        x, weight = args[0], args[1]
        low = weight.reshape(-1).to(x.dtype)
        shift = args[3].reshape(-1).to(x.dtype) if op == "layer_norm" else None
        fused = {
            "rms_norm": lambda x, w, eps: F.rms_norm(x, low.shape, low, eps),
            "layer_norm": lambda x, w, eps, b: F.layer_norm(x, low.shape, low, shift, eps),
        }
        found["torch"] = fused[op]
    if op == "gelu_tanh":
        found["torch"] = lambda x: F.gelu(x, approximate="tanh")
    if op == "group_norm_silu":
        low, shift = (x.to(args[0].dtype) for x in args[2:4])
        found["torch"] = lambda x, groups, w, b, eps: F.silu(F.group_norm(x, groups, low, shift, eps))
    if op == "upsample_conv":
        plain = _unfolded(args[1]).contiguous(memory_format=torch.channels_last)
        found["torch"] = lambda x, _, b: ops.upsample_conv(x, plain, b)
    if op in ("rms_norm", "swiglu") and find(LIGER, "liger-kernel").problem is None:
        found["liger"] = _liger(op, args)
    return {name: call for name, call in found.items() if name not in without}


def _unfolded(weight: Tensor) -> Tensor:
    """The 3x3 kernel [O, I, 3, 3] that `ops.fold_upsample` made `weight` [I, O, 4, 4] of: of three taps w, its
    rows are w2, w1 + w2, w0 + w1, w0."""
    w = weight.float()
    for axis in (2, 3):
        a, b, _, d = w.unbind(axis)
        w = torch.stack((d, b - a, a), axis)
    return w.transpose(0, 1).to(weight.dtype)


def _liger(op: str, args: tuple[Any, ...]) -> Callable:
    from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu

    if op == "swiglu":
        return lambda x: liger_swiglu(*x.chunk(2, -1))
    weight = args[1].reshape(-1).to(args[0].dtype)
    return lambda x, w, eps: liger_rms_norm(x, weight, eps)


def needs_rounded_weights(name: str) -> bool:
    """Rivals whose weights are in the storage dtype round more than the specification allows for."""
    return name in ("torch", "liger")


def clone(value: Any) -> Any:
    """A deep copy of the tensors in nested tuples, strides kept."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(clone(v) for v in value) if isinstance(value, tuple) else value
