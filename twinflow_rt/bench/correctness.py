"""Whether a contender's outputs are right: the error rule that stands before every speed-up.

All are compared with the unfolded network on eager ops in float32, from the same prompts and the same
(rounded) noise: latents x0, and images. With e = the error relative to the reference,

    float32          max-norm e <= 1e-5
    16-bit and less  rms e of ours <= 1.1 x that of the unfolded eager network in the same dtype;
                     rms e of a peer <= 2 x (a peer may round more, but must compute the same thing)

where the bound grows by two standard errors, 2 / sqrt(n), of the ratio of two rms of n independent values:
nothing for an image of usual size, a quarter for 64 values.

`tolerance` replaces the rule by rms e <= tolerance: for precisions (fp8, int8) that trade error for speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

FLOAT32_BOUND, OURS_FACTOR, PEER_FACTOR = 1e-5, 1.1, 2.0
KINDS = ("latents", "images")


@dataclass(frozen=True)
class Error:
    """How far one output is off: largest and root-mean-square difference, relative to the reference's largest
    magnitude and root mean square."""

    worst: float
    rms: float


@dataclass(frozen=True)
class Verdict:
    """What `judge` found. errors: by output. reason: in words, whether it passed or not."""

    errors: dict[str, Error]
    passed: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it: null for an infinite error."""
        raw = asdict(self)
        finite = {k: {n: x if math.isfinite(x) else None for n, x in e.items()} for k, e in raw["errors"].items()}
        return {**raw, "errors": finite}


def error(got: Tensor, reference: Tensor) -> Error:
    """Return the error of `got`, infinite where shapes differ or anything is not finite."""
    if got.shape != reference.shape or not got.isfinite().all():
        return Error(math.inf, math.inf)
    difference, reference = got.double() - reference.double(), reference.double()
    tiny = torch.finfo(torch.float64).tiny
    worst = difference.abs().max() / reference.abs().max().clamp_min(tiny)
    rms = difference.square().mean().sqrt() / reference.square().mean().sqrt().clamp_min(tiny)
    return Error(worst.item(), rms.item())


def judge(
    got: Sequence[Tensor], reference: Sequence[Tensor], *, dtype: str, eager: Sequence[Tensor] | None = None,
    ours: bool = True, tolerance: float | None = None,
) -> Verdict:  # fmt: skip
    """Judge outputs by the rule above. got, reference, eager: latents and images; eager: the unfolded eager network's
    in `dtype`, needed below float32 where no tolerance is given."""
    errors = {kind: error(a, b) for kind, a, b in zip(KINDS, got, reference, strict=True)}
    faults = []
    for i, (kind, e) in enumerate(errors.items()):
        if tolerance is not None:
            value, bound, norm = e.rms, tolerance, "rms"
        elif dtype == "float32":
            value, bound, norm = e.worst, FLOAT32_BOUND, "max"
        else:
            if eager is None:
                raise ValueError(f"judging {dtype} needs the eager network's outputs, or a tolerance")
            factor = OURS_FACTOR if ours else PEER_FACTOR
            factor *= 1 + 2 / math.sqrt(reference[i].numel())
            value, bound, norm = e.rms, factor * error(eager[i], reference[i]).rms, "rms"
        if not value <= bound:
            faults.append(f"{norm} error of {kind} is {value:.2e}, allowed {bound:.2e}")
    return Verdict(errors, not faults, "; ".join(faults) or "within the error rule")
