"""Closing step of the sampler."""

from __future__ import annotations

from torch import Tensor


def x0_project(x: Tensor, velocity: Tensor, t: float = 1.0) -> Tensor:
    """x0 = x_t - t * F, the clean latents that one velocity F(x_t, t, tt) points to (arXiv 2512.05150).

    x, velocity: [B, C, H, W]. float32 inside, one rounding to x's dtype.
    """
    return (x.float() - t * velocity.float()).to(x.dtype)
