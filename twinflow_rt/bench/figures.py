"""Figures made from what was measured: speed-ups, achieved rates, what the program is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigError
from ..ops import Target, select
from ..ops.selection import Choice
from ..pipeline import Pipeline
from ..planning.parameters import parameter_bytes
from ..planning.work import predict_stages
from . import stats
from .ceilings import Ceilings
from .correctness import Verdict
from .timing import Samples
from .workload import Workload


def speedup(ours: Samples, theirs: Samples | None, mine: Verdict, other: Verdict | None) -> dict[str, Any]:
    """Return {"speedup", "interval", "reason"}: null with a reason where one of the outputs is not known to be
    right."""
    if theirs is None or other is None:
        return {"speedup": None, "interval": None, "reason": "the peer could not be run; see the notes"}
    for who, verdict in (("ours", mine), ("the peer's", other)):
        if not verdict.passed:
            return {"speedup": None, "interval": None, "reason": f"no speed-up is stated: {who}: {verdict.reason}"}
    interval = stats.ratio_interval(theirs.seconds, ours.seconds, paired=True)
    return {"speedup": theirs.median / ours.median, "interval": list(interval), "reason": "both outputs passed"}


def prefer(pipe: Pipeline, backend: str) -> tuple[Choice, ...]:
    """Put `backend` first wherever an op has it; return what was chosen. Raises ConfigError where it serves none,
    with the reasons."""
    network: Any = pipe.program.network
    network.ops, choices = select(Target.of_network(network.config, pipe.device, pipe.dtype), backend)
    if not any(choice.chosen == backend for choice in choices):
        reasons = {reason for choice in choices for name, reason in choice.refused if name == backend}
        why = "; ".join(sorted(reasons)) or "there is none of that name"
        raise ConfigError(f"backend {backend!r} serves no op here: {why}")
    return choices


def efficiency(
    pipe: Pipeline, work: Workload, timed: dict[str, Samples], ceiling: Ceilings, dtype: str
) -> dict[str, Any]:
    """Return the rates that each stage reached, and the roofline's least time for its FLOPs and weights.

    FLOPs are of the whole batch; weights are read once, activations are left out, so the least time is a low one.
    """
    rows = {}
    for stage in predict_stages(pipe.text, pipe.program.network, pipe.vae, work.height, work.width, pipe.dtype):
        flops, seconds, weights = stage.flops * len(work.prompts), timed[stage.name].median, stage.weight_bytes
        floor = ceiling.seconds(flops, weights, dtype)
        compute = flops / ceiling.gemm[dtype] >= weights / ceiling.copy
        rows[stage.name] = {
            "flops": flops, "weight_bytes": weights, "flops_per_second": flops / seconds,
            "bytes_per_second": weights / seconds, "floor_seconds": floor,
            "fraction_of_floor": floor / seconds, "bound": "compute" if compute else "memory",
        }  # fmt: skip
    return rows


def describe(pipe: Pipeline, work: Workload, choices: Sequence[Choice]) -> dict[str, Any]:
    networks = [part.network for part in (*pipe.text.parts, *pipe.vae.parts)] + [pipe.program.network]
    with torch.inference_mode():
        tokens = pipe.text(list(work.prompts)).lengths
    return {
        "family": pipe.program.plan.family,
        "parameters": sum(p.numel() for network in networks for p in network.parameters()),
        "weight_bytes": sum(parameter_bytes(network) for network in networks),
        "ops": {choice.op: choice.chosen for choice in choices},
        "prompt_tokens": list(tokens),
    }
