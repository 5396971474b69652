"""The scheduler of an ordinary flow model: from what diffusers saved of it to a sampler that evaluates where it would.

Times are float32, as diffusers computes them. The three schedulers that the supported families were published with:

    FlowMatchEulerDiscreteScheduler   Euler; times shifted by a constant, or by the number of image tokens
    DPMSolverMultistepScheduler       SANA: DPM-Solver++(2M) on flow times, whole thousandths of which the network sees
    SCMScheduler                      SANA-Sprint: angles s of TrigFlow, t = sin s / (sin s + cos s), fresh noise a step
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import check_choice, check_flag, check_integer, check_number, shown
from ..errors import ConfigError
from .schedule import SamplerConfig, resolve_sampler

FILE = "scheduler/scheduler_config.json"
FLOW, DPM, SCM = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "SCMScheduler"
MAX_EVALUATIONS = 100  # that a network is folded for
TRAINED = 1000  # times that networks count to
LARGEST_ANGLE, MIDDLE_ANGLE = 1.57080, 1.3  # of SANA-Sprint's steps: the first, and of two the second

# what is computed here; other values make another scheduler
ONLY: dict[str, dict[str, Any]] = {
    FLOW: {"num_train_timesteps": TRAINED, "invert_sigmas": False, "use_karras_sigmas": False,
           "use_exponential_sigmas": False, "use_beta_sigmas": False},
    DPM: {"num_train_timesteps": TRAINED, "prediction_type": "flow_prediction", "use_flow_sigmas": True,
          "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero",
          "thresholding": False, "use_karras_sigmas": False, "use_lu_lambdas": False, "use_exponential_sigmas": False,
          "use_beta_sigmas": False, "use_dynamic_shifting": False},
    SCM: {"prediction_type": "trigflow"},
}  # fmt: skip
STATED = {DPM: ("prediction_type", "use_flow_sigmas")}  # that a file must say, as diffusers' default is another value
NUMBERS = {  # with diffusers' defaults
    "shift": 1.0, "flow_shift": 1.0, "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5,
    "max_shift": 1.15, "shift_terminal": 0.0,
}  # fmt: skip
POSITIVE = ("shift", "flow_shift", "base_image_seq_len", "max_image_seq_len")


@dataclass(frozen=True)
class Scheduler:
    """What scheduler_config.json says. Raises ConfigError for a scheduler that is not one of the three.

    steps: evaluations of calls that name none; None: those have a sampler of their own. evenly: whether the family's
    pipeline hands its scheduler times spread evenly from 1 to 1/n, in place of those it would choose. mu(tokens,
    steps): the logarithm of a dynamic shift, in place of the one from base_shift to max_shift. distilled: whether the
    model was trained to need no guidance.
    """

    settings: Mapping[str, Any]
    steps: int | None
    evenly: bool = False
    mu: Callable[[int, int], float] | None = None
    distilled: bool = False

    def __post_init__(self) -> None:
        kind, said = self.settings.get("_class_name"), self.settings
        if kind not in ONLY:
            raise ConfigError(
                f"{FILE} says _class_name {shown(kind)}; ordinary flow models are sampled by {', '.join(ONLY)}: give "
                "the scheduler that the model was published with"
            )
        for key, value in ONLY[kind].items():
            if said.get(key, None if key in STATED.get(kind, ()) else value) != value:
                raise ConfigError(f"{FILE}: {key} is {shown(said.get(key))}; {kind} is computed with {value!r} only")
        if strange := [key for key in NUMBERS if self._number(key) <= 0 and key in POSITIVE]:
            raise ConfigError(f"{FILE}: {strange[0]} must be positive; got {shown(said[strange[0]])}")
        for key in ("use_dynamic_shifting", "stochastic_sampling"):
            check_flag(f"{FILE}: {key}", said.get(key, False))
        check_choice(f"{FILE}: time_shift_type", said.get("time_shift_type", "exponential"), ("exponential", "linear"))
        if self._number("base_image_seq_len") == self._number("max_image_seq_len"):
            raise ConfigError(f"{FILE}: base_image_seq_len and max_image_seq_len must differ")
        if not 0 <= self._number("shift_terminal") < 1:
            raise ConfigError(f"{FILE}: shift_terminal must be 0 or more and below 1; got {said['shift_terminal']}")

    @property
    def kind(self) -> str:
        """diffusers' class."""
        return str(self.settings["_class_name"])

    def sampler(self, steps: int, tokens: int) -> SamplerConfig:
        """Return the sampler of `steps` evaluations of an image of `tokens` tokens."""
        check_integer("nfe", steps, 1, MAX_EVALUATIONS)
        if self.kind == DPM:
            return self._dpm(steps)
        if self.kind == SCM:
            angles = np.linspace(LARGEST_ANGLE, 0, steps + 1)[:-1].astype(np.float32)
            if steps == 2:
                angles[1] = MIDDLE_ANGLE
            times = np.sin(angles) / (np.sin(angles) + np.cos(angles))
            return SamplerConfig(times=np.minimum(times, 1), stochast_ratio=1.0, mode="multi")
        times, stochastic = self._flow(steps, tokens), bool(self.settings.get("stochastic_sampling", False))
        return SamplerConfig(times=times.astype(np.float32), stochast_ratio=float(stochastic), mode="multi")

    def _flow(self, steps: int, tokens: int) -> Any:
        shift, dynamic = self._number("shift"), self.settings.get("use_dynamic_shifting", False)
        if self.evenly:
            times = np.linspace(1, 1 / steps, steps)
        else:  # from the shifted first to the shifted last time of training, then shifted once more
            last = 1 / TRAINED
            times = np.linspace(1, last if dynamic else shift * last / (1 + (shift - 1) * last), steps)
        if dynamic:
            names = "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"
            least, most, low, high = map(self._number, names)
            shift = low + (high - low) / (most - least) * (tokens - least)
            shift = shift if self.mu is None else self.mu(tokens, steps)
            if self.settings.get("time_shift_type", "exponential") == "exponential":
                shift = math.exp(min(shift, 700.0))
        times = shift * times / (1 + (shift - 1) * times)
        if (terminal := self._number("shift_terminal")) and times[-1] < 1:  # of one step diffusers makes NaN here
            times = 1 - (1 - times) * (1 - terminal) / (1 - times[-1])
        return times

    def _dpm(self, steps: int) -> SamplerConfig:
        shift = self._number("flow_shift")
        times = 1 - np.linspace(1, 1 / TRAINED, steps + 1)[:0:-1]
        times = shift * times / (1 + (shift - 1) * times)
        told: Any = np.floor(times * TRAINED) / TRAINED
        held: Any = times.astype(np.float32)
        return SamplerConfig(times=held, network_times=told, solver="dpm++2m", mode="multi")

    def _number(self, key: str) -> float:
        value = self.settings.get(key)
        return NUMBERS[key] if value is None else check_number(f"{FILE}: {key}", value)


def flux2_mu(tokens: int, steps: int) -> float:
    """Return FLUX.2's mu, fitted at 10 and 200 steps as lines over the number of tokens, and linear between them."""
    far = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return far
    near = 8.73809524e-05 * tokens + 1.89833333
    return far + (steps - 200) * (far - near) / 190


def sampler_of(
    nfe: int | None, sampler: SamplerConfig | str | None, default: SamplerConfig, scheduler: Scheduler | None,
    tokens: int,
) -> SamplerConfig:  # fmt: skip
    """Return a call's sampler: the one given, or one of `nfe` evaluations, by the model's own scheduler if it has one,
    else by TwinFlow's presets; where neither is given the scheduler's of its usual steps, or `default`. tokens: of the
    image. Raises ConfigError."""
    steps = None if scheduler is None else scheduler.steps if nfe is None else nfe
    if sampler is None and scheduler is not None and steps is not None:
        return scheduler.sampler(steps, tokens)
    return resolve_sampler(nfe, sampler) or default
