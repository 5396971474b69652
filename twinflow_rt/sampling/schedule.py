"""Sampler settings, and what they come to: the time grid, and every (t, tt) the network will see.

Nothing here touches a network or a device, so the compile pass can ask for a schedule and fold the
model's modulation at exactly those times. `sampler.py` holds the rules these settings steer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from ..config import check_choice, check_integer, integer, items, number, shown
from ..errors import ConfigError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODES = ("few", "any", "multi")
SOLVERS = ("euler", "dpm++2m")
MAX_STEPS = 1000


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of the UCGM sampler (arXiv 2505.07447), under TwinFlow's names. Hashable.

    sampling_steps: network evaluations asked for, 1..1000; order 2 spends an even number less one.
    stochast_ratio: share of the noise estimate's variance replaced by fresh noise at each step,
        0 (deterministic) .. 1, or "SDE" for the share that follows the reverse-time SDE.
    extrapol_ratio: how far estimates are extrapolated from the step before, 0..1.
    sampling_order: 1, or 2 for a Heun-like correction.
    time_dist_ctrl: (a, b, c) > 0 of the Kumaraswamy warp of the grid; (1, 1, 1) leaves it uniform.
    rfba_gap_steps: (start, end), the grid runs from t = 1 - start down to t = end, then 0.
    mode: the target time tt given to the network: 0 ("few"), the next time ("any"), or the same
        time, which is the instantaneous velocity ("multi").
    times: t_0 > t_1 > ... > t_{N-1} > 0 as given, in place of the grid, which then is left alone, as are order and
        extrapolation; 0 is appended, `sampling_steps` is their number. They and all arithmetic are float64: nothing is
        rounded to the model's dtype but what the network takes.
    network_times: with `times`, what the network is told in their place, where a scheduler rounds that.
    solver: with `times`, "euler", or "dpm++2m": from the second step on, estimates are extrapolated by the one before
        (DPM-Solver++(2M), arXiv 2211.01095); the last step is Euler's.
    """

    sampling_steps: int = 1
    stochast_ratio: float | Literal["SDE"] = 0.0
    extrapol_ratio: float = 0.0
    sampling_order: int = 1
    time_dist_ctrl: tuple[float, float, float] = (1.0, 1.0, 1.0)
    rfba_gap_steps: tuple[float, float] = (0.0, 0.0)
    mode: Literal["few", "any", "multi"] = "few"
    times: tuple[float, ...] | None = None
    network_times: tuple[float, ...] | None = None
    solver: Literal["euler", "dpm++2m"] = "euler"

    def __post_init__(self) -> None:
        sde = isinstance(self.stochast_ratio, str) and self.stochast_ratio == "SDE"
        values = {
            "sampling_steps": check_integer("sampling_steps", self.sampling_steps, 1, MAX_STEPS),
            "stochast_ratio": "SDE" if sde else _ratio("stochast_ratio", self.stochast_ratio, "0..1 or 'SDE'"),
            "extrapol_ratio": _ratio("extrapol_ratio", self.extrapol_ratio, "a number 0..1"),
            "sampling_order": check_integer("sampling_order", self.sampling_order, 1, 2),
            "time_dist_ctrl": _numbers("time_dist_ctrl", self.time_dist_ctrl, 3),
            "rfba_gap_steps": _numbers("rfba_gap_steps", self.rfba_gap_steps, 2),
            "mode": check_choice("mode", self.mode, MODES),
            "solver": check_choice("solver", self.solver, SOLVERS),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        warp, gaps = self.time_dist_ctrl, self.rfba_gap_steps
        _require(min(warp) > 0, "time_dist_ctrl", warp, "three positive numbers (a, b, c)")
        _require(
            min(gaps) >= 0 and sum(gaps) < 1, "rfba_gap_steps", gaps,
            "(start, end), both 0 or more, adding up to less than 1",
        )  # fmt: skip
        self._check_times()

    def _check_times(self) -> None:
        """Give `times`, `network_times` and `sampling_steps` their checked values. Raise ConfigError."""
        if self.times is None:
            _require(self.network_times is None, "network_times", self.network_times, "None where times is")
            _require(self.solver == "euler", "solver", self.solver, "'euler' where times is None")
            return
        count = len(items(self.times) or ())
        times = _numbers("times", self.times, count)
        falling = all(a > b for a, b in pairwise((*times, 0.0)))
        wanted = f"1 to {MAX_STEPS} numbers that fall from 1 at most and stay above 0"
        _require(1 <= count <= MAX_STEPS and times[0] <= 1 and falling, "times", self.times, wanted)
        _require(self.sampling_steps in (1, count), "sampling_steps", self.sampling_steps, f"{count}, as many as times")
        grid = self.sampling_order, self.extrapol_ratio, self.time_dist_ctrl, self.rfba_gap_steps
        alone = "sampling_order, extrapol_ratio, time_dist_ctrl and rfba_gap_steps"
        _require(grid == (1, 0.0, (1.0, 1.0, 1.0), (0.0, 0.0)), alone, grid, "left alone where times are given")
        object.__setattr__(self, "sampling_steps", count)
        object.__setattr__(self, "times", times)
        if self.network_times is not None:
            told = _numbers("network_times", self.network_times, count)
            _require(all(0 <= time <= 1 for time in told), "network_times", told, "numbers 0..1")
            object.__setattr__(self, "network_times", told)

    @property
    def intervals(self) -> int:
        """N, the steps on the grid: `sampling_steps`, at order 2 halved and rounded up."""
        return (self.sampling_steps + 1) // 2 if self.sampling_order == 2 else self.sampling_steps


@dataclass(frozen=True)
class Step:
    """One step t -> t' with its coefficients: Python floats that the model dtype holds exactly
    (keep and inject: in float64 unless the ratio is "SDE")."""

    t: float
    tt: float
    gamma: float  # 1 - t
    t_next: float
    gamma_next: float
    keep: float  # sqrt(1-s), weight of z_hat
    inject: float  # sqrt(s), weight of fresh noise
    heun: float | None  # t' - (1-t') t / (1-t), the weight of the averaged z; None: no correction
    heun_tt: float  # target time of the correcting evaluation
    at: float  # the time that the network is told
    second_order: float = 0.0  # x_hat <- x_hat + this * (x_hat - that of the step before)


def time_grid(config: SamplerConfig, dtype: torch.dtype) -> tuple[float, ...]:
    """The times t_0 > t_1 > ... > t_N = 0 of the steps, each rounded to the model's `dtype`.

    u = linspace(start, 1 - end, N) in float64, rounded; t = 1 - (1 - (1 - u^a)^b)^c, every
    operation rounded; 0 appended. With end = 0 the linspace has N + 1 points and loses its last.
    State and network use the same values. Computed on the CPU: no device changes a schedule.
    TRAP: in bfloat16 the released start time 0.999 rounds to exactly 1.
    """
    return tuple(_grid(config, dtype).tolist())


def schedule(config: SamplerConfig, dtype: torch.dtype) -> tuple[tuple[float, float], ...]:
    """(t, tt) of every network evaluation in the order `sample` makes them: what to fold for."""
    pairs = []
    for step in steps(config, dtype):
        pairs.append((step.at, step.tt))
        if step.heun is not None:
            pairs.append((step.t_next, step.heun_tt))
    return tuple(pairs)


@lru_cache(maxsize=128)
def steps(config: SamplerConfig, dtype: torch.dtype) -> tuple[Step, ...]:
    """The N steps of a run in model `dtype`."""
    grid = _grid(config, dtype)
    if config.times is not None:
        return tuple(_given_step(config, config.times, i) for i in range(config.intervals))
    heun = config.sampling_order == 2
    return tuple(
        _step(config, grid[i], grid[i + 1], heun and i + 1 < config.intervals) for i in range(config.intervals)
    )


def preset(nfe: int, mode: Literal["few", "any", "multi"] | None = None) -> SamplerConfig:
    """Settings for `nfe` network evaluations without guidance.

    mode None means "few" up to 8 evaluations and "multi" above.
    "few", 1..8: full renoising (stochast_ratio 1). 1, 2 and 4 are `PRESETS`; 3 takes the end gap
        midway between those of 2 and 4, and 5..8 keep that of 4: choices of ours, not released.
    "any", 1..100: PRESETS["any"] at that many steps; at 1 the same as "few".
    "multi", 1..100: plain flow matching, PRESETS["multi"] at that many steps; good from about 20.
        Above 60, bfloat16 has too few values near 1 and may repeat a time (harmless, but wasted).
    """
    count = integer(nfe)
    if mode is None:
        mode = "few" if count is not None and count <= 8 else "multi"
    check_choice("mode", mode, MODES)
    most = 8 if mode == "few" else 100
    hint = f"an integer 1..{most} in mode '{mode}'; mode 'multi' goes up to 100"
    _require(count is not None and 1 <= count <= most, "nfe", nfe, hint)
    nfe = int(nfe)
    if nfe == 1 and mode != "multi":
        return PRESETS["1"]
    if mode == "few":
        end = {2: 0.6, 3: 0.55}.get(nfe, 0.5)
        return SamplerConfig(nfe, stochast_ratio=1.0, rfba_gap_steps=(0.001, end))
    if mode == "any":
        return SamplerConfig(nfe, rfba_gap_steps=(0.001, 0.5), mode="any")
    return SamplerConfig(nfe, time_dist_ctrl=(1.17, 0.8, 1.1), rfba_gap_steps=(0.001, 0.0), mode="multi")


def started(config: SamplerConfig, strength: float) -> SamplerConfig:
    """Return `config` for images that start from given ones, at time `strength` of its first, 0 < strength <= 1.

    A grid is drawn together: all its times are multiplied, so there are as many evaluations. Given times are cut, as
    diffusers' pipelines do: of N the last ones are left, N * strength of them rounded up. Raises ConfigError for
    samplers of order 2 and such that extrapolate."""
    if strength == 1:
        return config
    if (times := config.times) is None:
        if config.sampling_order != 1 or config.extrapol_ratio:
            raise ConfigError("strength= takes samplers of sampling_order 1 and extrapol_ratio 0: give nfe= instead")
        grid = tuple(strength * t for t in time_grid(config, torch.float64)[:-1])
        return SamplerConfig(len(grid), stochast_ratio=config.stochast_ratio, mode=config.mode, times=grid)
    first = int(len(times) - len(times) * strength)
    told = None if config.network_times is None else config.network_times[first:]
    return replace(config, sampling_steps=len(times) - first, times=times[first:], network_times=told)


def resolve_sampler(nfe: int | None, sampler: SamplerConfig | str | None) -> SamplerConfig | None:
    """Sampler settings from a number of evaluations, a preset's name, or as given; None if neither is."""
    if nfe is not None and sampler is not None:
        raise ConfigError("give nfe or sampler, not both: a sampler fixes the number of evaluations")
    if nfe is not None:
        return preset(nfe)
    if isinstance(sampler, str):
        if sampler not in PRESETS:
            known = ", ".join(PRESETS)
            raise ConfigError(f"sampler {shown(sampler)} is no preset; use one of {known} or a SamplerConfig")
        return PRESETS[sampler]
    if sampler is not None and not isinstance(sampler, SamplerConfig):
        raise ConfigError(f"sampler must be a SamplerConfig or a preset's name, not {type(sampler).__name__}")
    return sampler


def _grid(config: SamplerConfig, dtype: torch.dtype) -> Tensor:
    """`time_grid` as a tensor [N + 1] of `dtype`."""
    if dtype not in DTYPES:
        raise ConfigError(f"the sampler works in {', '.join(map(str, DTYPES))}, not in {dtype}; cast the noise")
    if config.times is not None:
        return torch.tensor((*config.times, 0.0), dtype=torch.float64)
    n, (start, end) = config.intervals, config.rfba_gap_steps
    u = torch.linspace(start, 1 - end, n + (end == 0), dtype=torch.float64)[:n].to(dtype)
    a, b, c = config.time_dist_ctrl
    t = 1 - (1 - (1 - u**a) ** b) ** c
    return torch.cat((t, torch.zeros_like(t[:1])))


def _step(config: SamplerConfig, t: Tensor, t_next: Tensor, correct: bool) -> Step:
    """Coefficients by 0-d tensor arithmetic, so that each operation rounds to the model dtype."""
    gamma, gamma_next = 1 - t, 1 - t_next
    keep, inject = _noise_weights(config, t, t_next)
    heun = float(t_next - gamma_next * t / gamma) if correct and gamma != 0 else None
    tt = {"few": 0.0, "any": float(t_next), "multi": float(t)}[config.mode]
    heun_tt = 0.0 if config.mode == "few" else float(t_next)
    return Step(float(t), tt, float(gamma), float(t_next), float(gamma_next), keep, inject, heun, heun_tt, float(t))


def _given_step(config: SamplerConfig, times: tuple[float, ...], i: int) -> Step:
    """Step i of a schedule that is given, in float64."""
    t, t_next, second_order = times[i], (*times, 0.0)[i + 1], 0.0
    at = t if config.network_times is None else config.network_times[i]
    keep, inject = _noise_weights(config, torch.tensor(t, dtype=torch.float64), torch.tensor(t_next))
    if config.solver == "dpm++2m" and 0 < i < len(times) - 1 and times[i - 1] < 1:
        before, now, after = (math.log(1 - time) - math.log(time) for time in (times[i - 1], t, t_next))
        second_order = 0.5 * (after - now) / (now - before)
    tt = {"few": 0.0, "any": t_next, "multi": at}[config.mode]
    return Step(t, tt, 1 - t, t_next, 1 - t_next, keep, inject, None, 0.0, at, second_order)


def _noise_weights(config: SamplerConfig, t: Tensor, t_next: Tensor) -> tuple[float, float]:
    """sqrt(1-s) and sqrt(s). Into t' = 0 nothing is injected: its weight t' is 0."""
    if t_next == 0:
        return 1.0, 0.0
    if config.stochast_ratio == "SDE":
        root = (t_next - t).abs().sqrt() * (2 * t).sqrt() / t_next
        s = (root**2).clamp(0, 1)
        return float((1 - s) ** 0.5), float(s**0.5)
    return (1 - config.stochast_ratio) ** 0.5, config.stochast_ratio**0.5


def _require(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {wanted}; got {shown(value)}")


def _ratio(name: str, value: object, wanted: str) -> float:
    found = number(value)
    _require(found is not None and 0 <= found <= 1, name, value, wanted)
    return found or 0.0


def _numbers(name: str, value: object, count: int) -> tuple[float, ...]:
    """Return a list, a tuple or an array of `count` finite numbers as a tuple of floats."""
    found = [x for item in items(value) or () if (x := number(item)) is not None]
    _require(len(found) == count == len(items(value) or ()), name, value, f"{count} finite numbers")
    return tuple(found)


PRESETS: Mapping[str, SamplerConfig] = MappingProxyType(
    {
        # x0 = z - F(z, 1, 0), from t = 1 exactly in every dtype, as trained
        "1": SamplerConfig(1),
        # the released inference settings for 2 and 4 evaluations
        "2": SamplerConfig(2, stochast_ratio=1.0, rfba_gap_steps=(0.001, 0.6)),
        "4": SamplerConfig(4, stochast_ratio=1.0, rfba_gap_steps=(0.001, 0.5)),
        # the published any-step and multi-step settings
        "any": SamplerConfig(4, rfba_gap_steps=(0.001, 0.5), mode="any"),
        "multi": SamplerConfig(30, time_dist_ctrl=(1.17, 0.8, 1.1), rfba_gap_steps=(0.001, 0.0), mode="multi"),
    }
)
