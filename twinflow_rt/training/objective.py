"""TwinFlow's training objective (arXiv 2512.05150): one model, no GAN, no teacher.

Every batch is split in four parts, all evaluated in one forward pass at (x_t, t, tt):

    e2e  t = 1, tt = 0             the one-step map, also pulled by the rectification term
    mul  tt just below t           the ordinary velocity (flow matching), for a share of samples without their prompt
    any  tt uniform in [0, t], or 0  any-step jumps, consistent with two shorter ones (RCGM)
    twin x = the model's own one-step samples, times flagged as the twin (fake) trajectory

The base loss regresses F on z - x, for jumps replaced by the RCGM target (arXiv 2505.07447's continuous limit by finite
differences of `delta`, residual clamped to +-1). The rectification term moves one-step samples along clamp(v_twin -
v_real, +-1): where the velocities of the model's own distribution and of the data agree, nothing pulls.

How times are flagged. The paper marks the twin by (-t, -t). Z-Image's two-time embedding depends on |s| and s - s2 only
(see models/transformers/z_image.py), for which (-t, -t) and (t, t) are one input; and as sign(0) = 0 gives s2 = 0, the
jump to the end (t, 0) has s - s2 = 1 - t, of the sign that (t, -t) would have, which moreover fades as t -> 1.
`twin_times` returns (t, t - 1), for which s - s2 = 1 at every t. As (1, 0) and (1, 1) are one input, too, velocities
stay below `latest`, also those that guide the one-step map. Few-step sampling takes (t, 0): a share of the jumps ends
there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# velocity(x_t [B,C,H,W], t [B], tt [B], cond) -> F [B,C,H,W]; cond is whatever `pick` can index
Velocity = Callable[[Tensor, Tensor, Tensor, object], Tensor]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and distributions of the TwinFlow objective; defaults follow the published recipe."""

    parts: tuple[float, float, float, float] = (1, 1, 1, 1)  # e2e, mul, any, twin
    time_beta: tuple[float, float] = (1.0, 1.0)  # t ~ Beta(a, b)
    order: int = 2  # RCGM: evaluations that estimate the rest of a jump
    delta: float = 0.01  # RCGM: finite difference in t
    guidance: float = 0.5  # target += guidance * (v_cond - v_uncond), 0 = off
    rectify: float = 0.5  # weight of the rectification term
    clamp: float = 1.0
    to_end: float = 0.5  # share of "any" that jumps to tt = 0 exactly, an input of its own
    latest: float = 0.99  # largest t of velocities: t = 1 is the one-step map's
    drop_prompt: float = 0.1  # share of "mul" with the empty prompt, without which guidance would compare with nothing


def flow_matching_loss(velocity: Velocity, x: Tensor, t: Tensor, cond: object) -> Tensor:
    """Return mean |F(x_t, t, t) - (z - x)|^2, x_t = t z + (1 - t) x   (arXiv 2210.02747). t: [B]."""
    z = torch.randn_like(x)
    return (velocity(_mix(x, z, t), t, t, cond) - (z - x)).square().mean()


def twin_times(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (t, tt) that mark time t of the twin trajectory for Z-Image's embedder."""
    return t, t - 1


class TwinFlowObjective:
    """Computes the loss of one batch; `target` is the EMA copy that supplies regression targets.

    velocity, target: see `Velocity`. pick(cond, mask) selects samples of a condition; drop(cond, mask) gives the
    condition with the masked samples' prompts replaced by the empty one.
    """

    def __init__(
        self, velocity: Velocity, target: Velocity, config: ObjectiveConfig,
        pick: Callable[[object, Tensor], object], drop: Callable[[object, Tensor], object],
    ) -> None:  # fmt: skip
        self.velocity, self.target, self.config, self.pick, self.drop = velocity, target, config, pick, drop

    def __call__(self, x: Tensor, cond: object) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, detached parts by name). x: clean latents [B, C, H, W] float32, B >= 4."""
        cfg = self.config
        e2e, mul, jump, twin = masks = self._split(len(x), x.device)
        cond = self.drop(cond, mul & (torch.rand(len(x), device=x.device) < cfg.drop_prompt))
        with torch.no_grad():
            x, t, tt = self._inputs(x, cond, masks)
            z = torch.randn_like(x)
            x_t, target = _mix(x, z, t), z - x
            flagged = twin_times(t)
            t_in, tt_in = torch.where(twin, flagged[0], t), torch.where(twin, flagged[1], tt)
        velocity = self.velocity(x_t, t_in, tt_in, cond)
        with torch.no_grad():
            real = ~twin
            if cfg.guidance:
                target[real] += self._guide(x_t[real], t[real], self.pick(cond, real))
            jumps = e2e | jump
            target[jumps] = self._rcgm_target(
                velocity.detach()[jumps], target[jumps], x_t[jumps], t[jumps], tt[jumps], self.pick(cond, jumps)
            )
            weight = torch.tan((1 - (t - tt).clamp_min(0)) * math.pi / 2.5) + 1
            weight = torch.where(twin, 1.0, weight)
        base = (balanced(velocity - target) * weight).mean()
        loss, parts = base, {"base": base.detach()}
        if cfg.rectify and e2e.any():
            rectify = self._rectify(x_t[e2e], velocity[e2e], self.pick(cond, e2e))
            loss, parts = loss + cfg.rectify * rectify, {**parts, "rectify": rectify.detach()}
        return loss, parts

    def _split(self, batch: int, device: torch.device) -> list[Tensor]:
        """Return boolean masks [B] of the four parts, contiguous, in order."""
        ends = torch.tensor(self.config.parts).cumsum(0)
        edges = [0, *(ends / ends[-1] * batch).round().int().tolist()]
        index = torch.arange(batch, device=device)
        return [(index >= a) & (index < b) for a, b in pairwise(edges)]

    def _inputs(self, x: Tensor, cond: object, masks: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return clean latents (the twin part replaced by own one-step samples) and times t, tt [B]."""
        e2e, mul, jump, twin = masks
        a, b = (torch.tensor(v, device=x.device) for v in self.config.time_beta)
        t = torch.distributions.Beta(a, b).sample((len(x),)).clamp(1e-3, 1) * self.config.latest
        span = torch.where(mul, 0.05, 1.0)
        tt = t - torch.rand_like(t) * span * t
        tt = torch.where(jump & (torch.rand_like(t) < self.config.to_end), 0.0, tt)
        # samplers of a few steps start at 0.999
        t, tt = torch.where(e2e, 1 - 1e-3 * torch.rand_like(t), t), torch.where(e2e, 0.0, tt)
        tt = torch.where(twin, t, tt)
        if twin.any():
            z = torch.randn_like(x[twin])
            one = torch.ones(len(z), device=x.device)
            x = x.clone()
            x[twin] = z - self.velocity(z, one, 0 * one, self.pick(cond, twin))
        return x, t, tt

    def _guide(self, x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        """Correct the target by classifier-free guidance (arXiv 2207.12598)."""
        t, every = t.clamp_max(self.config.latest), torch.ones_like(t, dtype=torch.bool)
        empty = self.drop(cond, every)
        return self.config.guidance * (self.target(x_t, t, t, cond) - self.target(x_t, t, t, empty))

    def _rcgm_target(
        self, velocity: Tensor, target: Tensor, x_t: Tensor, t: Tensor, tt: Tensor, cond: object
    ) -> Tensor:
        """Return F - clamp(r), with r the violation of  (t - tt) F = delta * target + integral from t - delta to tt,
        divided by delta (by t - tt where the jump is shorter than delta)."""
        cfg = self.config
        step = torch.minimum(t - tt, torch.full_like(t, cfg.delta)).clamp_min(1e-4)
        start = t - step
        x, rest = x_t - _wide(step) * target, torch.zeros_like(x_t)
        for i in range(cfg.order):
            here = start + (tt - start) * (i / cfg.order)
            there = start + (tt - start) * ((i + 1) / cfg.order)
            v = self.target(x, here, there, cond)
            x, rest = x - _wide(here - there) * v, rest + _wide(here - there) * v
        residual = (_wide((t - tt).clamp_min(1e-4)) * velocity - rest) / _wide(step) - target
        return velocity - residual.clamp(-cfg.clamp, cfg.clamp)

    def _rectify(self, z: Tensor, velocity: Tensor, cond: object) -> Tensor:
        """Return the loss whose gradient moves F along clamp(v_twin - v_real) at random times of the samples z - F."""
        with torch.no_grad():
            x = z - velocity
            t = torch.rand(len(x), device=x.device) * self.config.latest
            x_t = _mix(x, torch.randn_like(x), t)
            difference = self.velocity(x_t, *twin_times(t), cond) - self.velocity(x_t, t, t, cond)
            target = velocity - difference.clamp(-self.config.clamp, self.config.clamp)
        return (velocity - target).square().mean()  # unlike `balanced`, ends to pull as the two velocities meet


def _wide(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def _mix(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return _wide(t) * z + _wide(1 - t) * x


def balanced(error: Tensor, c: float = 1e-3) -> Tensor:
    """Return the per-sample robust loss [B]: mse weighted by 1 / sqrt(mse + c^2), weight detached (Barron's
    general loss at alpha = 1, arXiv 1701.03077), so that easy and hard times pull alike."""
    mse = error.square().flatten(1).mean(1)
    return mse * (mse.detach() + c * c).rsqrt()
