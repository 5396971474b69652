"""The sampler: one network evaluation on the fast path, UCGM's any-step rules beside it.

Convention: x_t = t z + (1-t) x, F = z - x, so one evaluation at t gives two estimates,

    x_hat = x_t - t F        z_hat = x_t + (1-t) F

One step is x0 = z - F(z, 1, 0). More steps walk a grid t_0 > ... > t_{N-1} > t_N = 0 (UCGM, arXiv
2505.07447, as TwinFlow runs it, arXiv 2512.05150). A step t -> t' is

    x <- (1-t') x_hat + t' (sqrt(1-s) z_hat + sqrt(s) noise)        s: `stochast_ratio`

and the result is x_hat of the last step. Precision: the grid and every coefficient are rounded to the model dtype (so
is each operation that forms them), x_hat and z_hat are formed in it, the state is float64.

Where the published code is undefined or contradicts itself, this is what happens here:

- Order 2's second evaluation gets no target time there, and crashes. Here it is made at (t', 0) in
  "few" mode, else at (t', t'), the instantaneous velocity a Heun correction wants. Only in "multi"
  mode does the correction have a meaning; the other two modes already take finite steps.
- Order 2's correction divides by 1 - t. From t = 1 it would be NaN: that step stays first-order and
  costs one evaluation. Just below 1 it is finite but unstable (the factor is t/(1-t), 999 at
  t = 0.999): start order 2 from a larger gap.
- With an end gap of 0, order 2 there also corrects the last step, then returns x_hat from before
  the correction. That evaluation changes nothing and is not made.
- "SDE" there overwrites its own setting with the first step's ratio and keeps it. Here each step
  has its own, s = clamp(2 t |t'-t| / t'^2, 0, 1), as the formula says.
- Extrapolation starts at the third step (index > 1), from the raw estimates of the step before, and
  does not touch the last x_hat, which is the result.

Two deviations from published code that is well defined, for which there is no switch:

- From 10 steps on, the original's pipelines keep every second estimate (`latents[1::2]`) and decode the last one kept.
  With an even number of steps that is the next-to-last estimate: the last evaluation is computed and thrown away. Here
  the last one is the result; `callback` gets the other, at done = total - 1. Odd numbers, and fewer steps, agree.
- In bfloat16 the original's SD3.5 and OpenUni multiply the target time by 1000 in bfloat16 (t itself in float32): 0.75
  becomes 752. Here both are multiplied without rounding. It shows in "any" and "multi" mode; in "few", and with one
  step, tt is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CancelledError, ConfigError
from ..ops import x0_project
from .schedule import SamplerConfig, Step, schedule, steps

Velocity = Callable[[Tensor, int], Tensor]
NoiseFn = Callable[[int], Tensor]
Keep = Callable[[Tensor, float], Tensor]


def unchanged(x: Tensor, t: float) -> Tensor:
    return x


@dataclass(frozen=True)
class Start:
    """Given images to start from: clean latents x and noise z, both [B, C, h, w] in the model's dtype. mask: bool
    [1 or B, 1, h, w], true where images are made anew; None: everywhere."""

    clean: Tensor
    noise: Tensor
    mask: Tensor | None = None

    def at(self, t: float) -> Tensor:
        """Return x_t = t z + (1-t) x: float32 inside (float64 for such latents), one rounding."""
        wide = torch.promote_types(self.noise.dtype, torch.float32)
        return (t * self.noise.to(wide) + (1 - t) * self.clean.to(wide)).to(self.noise.dtype)

    def keep(self, x: Tensor, t: float) -> Tensor:
        """Return the state x at time t, in the dtype it has, with x_t where images are not made anew."""
        return x if self.mask is None else torch.where(self.mask, x, self.at(t).to(x.dtype))


def from_function(fn: Callable[[Tensor, Tensor, Tensor], Tensor], config: SamplerConfig) -> Velocity:
    """Adapts fn(latents, t, tt) -> F, with t and tt float32 tensors [B], to the indexed signature
    that `sample` calls with `config`. (float64 latents get float64 times.)"""

    def velocity(latents: Tensor, index: int) -> Tensor:
        dtype = torch.promote_types(latents.dtype, torch.float32)
        t, tt = (
            torch.full((len(latents),), time, dtype=dtype, device=latents.device)
            for time in schedule(config, latents.dtype)[index]
        )
        return fn(latents, t, tt)

    return velocity


@torch.no_grad()
def sample(
    velocity: Velocity, noise: Tensor, config: SamplerConfig, *, noise_fn: NoiseFn | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None, cancel: Callable[[], bool] | None = None,
    project: Callable[[Tensor, Tensor, float], Tensor] = x0_project, keep: Keep = unchanged,
) -> Tensor:  # fmt: skip
    """Clean latents from `noise`, the state at the schedule's first time, both [B, ...] in the model dtype.

    velocity(latents, i) -> F: the network at entry i of `schedule(config, noise.dtype)`; latents
        and F are shaped as `noise`.
    noise_fn(i) -> float32 normals shaped as `noise`, injected on reaching t_i, i = 1..N-1. Needed
        where `stochast_ratio` is not 0 and N > 1. It is called after the network was, so that
        drawing the noise overlaps with the device's work.
    callback(done, total, x0): after each evaluation, with a copy of the estimate it gave.
    cancel(): asked before each evaluation; True raises CancelledError.
    project(noise, F, t): the op that ends the one-step path (float32 inside, one rounding).
    keep(x, t): called with the state behind each step, at its time, and with the result, at 0; returns what
        sampling goes on with (`Start.keep`).

    A single step touches no float64 and no elementwise op but `project`. Nothing here waits for the device, if noise_fn
    answers on it. Raises ConfigError for an unusable dtype, a missing noise_fn, a velocity of another shape.
    """
    plan = steps(config, noise.dtype)
    if noise_fn is None and any(step.inject for step in plan[:-1]):
        raise ConfigError(
            f"stochast_ratio={config.stochast_ratio!r} injects noise between steps: pass noise_fn, "
            "for example lambda i: step_noise(seeds, i, shape_chw)"
        )
    network = _Network(velocity, len(schedule(config, noise.dtype)), cancel, callback)
    if len(plan) == 1 and noise.dtype != torch.float64:
        x0 = project(noise, network(noise), plan[0].t)
        network.report(x0)
        return keep(x0, 0.0)
    network.exact = config.times is not None
    return keep(_integrate(network, noise, plan, config.extrapol_ratio, noise_fn, keep), 0.0)


def _integrate(
    network: _Network, noise: Tensor, plan: tuple[Step, ...], extrapolation: float, noise_fn: NoiseFn | None,
    keep: Keep = unchanged,
) -> Tensor:  # fmt: skip
    """The general path. The order of operations is the published one, to the last bit."""
    wide = torch.float32 if noise.device.type == "mps" else torch.float64  # mps has no float64
    x, raw = noise.to(wide), None
    for i, step in enumerate(plan[:-1]):
        x_hat, z_hat = network.estimate(x, noise.dtype, step.t, step.gamma)
        x_hat, z_hat = x_hat.to(wide), z_hat.to(wide)
        before, raw = raw, (x_hat, z_hat)
        if extrapolation and before is not None and i > 1:
            x_hat = x_hat + extrapolation * (x_hat - before[0])
            z_hat = z_hat + extrapolation * (z_hat - before[1])
        if step.second_order and before is not None:
            x_hat = x_hat + step.second_order * (x_hat - before[0])
            z_hat = x_hat + (x - x_hat) / step.t
        z = z_hat * step.keep
        if step.inject and noise_fn is not None:
            z = z + noise_fn(i + 1).to(x) * step.inject
        x_next = step.gamma_next * x_hat + step.t_next * z
        if step.heun is not None:
            _, z_next = network.estimate(x_next, noise.dtype, step.t_next, step.gamma_next)
            z = 0.5 * z_hat + 0.5 * z_next.to(wide)
            x_next = x * step.gamma_next / step.gamma + step.heun * z
        x = keep(x_next, step.t_next)
    x_hat, _ = network.estimate(x, noise.dtype, plan[-1].t, plan[-1].gamma)
    return x_hat.to(noise.dtype)


@dataclass
class _Network:
    """The velocity function with its evaluation counter, cancellation and progress. exact: estimates are formed in
    float64, from the state as it is."""

    velocity: Velocity
    total: int
    cancel: Callable[[], bool] | None
    callback: Callable[[int, int, Tensor], None] | None
    done: int = 0
    exact: bool = False

    def __call__(self, latents: Tensor) -> Tensor:
        if self.cancel is not None and self.cancel():
            raise CancelledError(f"sampling was cancelled after {self.done} of {self.total} network evaluations")
        flow = self.velocity(latents, self.done)
        if flow.shape != latents.shape:
            raise ConfigError(
                f"velocity returned shape {tuple(flow.shape)} for latents {tuple(latents.shape)}; "
                "it must return one value per latent"
            )
        self.done += 1
        return flow

    def estimate(self, state: Tensor, dtype: torch.dtype, t: float, gamma: float) -> tuple[Tensor, Tensor]:
        """x_hat and z_hat of one evaluation, in the model's dtype, or `exact`."""
        latents = state.to(dtype)
        flow = self(latents)
        x, flow = (state, flow.to(state.dtype)) if self.exact else (latents, flow)
        x_hat = x - flow * t
        self.report(x_hat.to(dtype))
        return x_hat, x + flow * gamma

    def report(self, x0: Tensor) -> None:
        if self.callback is not None:
            with torch.inference_mode(False):
                self.callback(self.done, self.total, x0.clone())  # an ordinary tensor, no recording's, to keep
