"""Closing step of the sampler."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .declaration import COMPILED, Op, op


def x0_project(x: Tensor, velocity: Tensor, t: float = 1.0) -> Tensor:
    """x0 = x_t - t * F, the clean latents that one velocity F(x_t, t, tt) points to (arXiv 2512.05150).

    x, velocity: [B, C, H, W]. float32 inside, one rounding to x's dtype.
    """
    return (x.float() - t * velocity.float()).to(x.dtype)


@dataclass(frozen=True)
class SampleOps:
    """What the sampler calls."""

    x0_project: Op = op(x0_project, *COMPILED)
