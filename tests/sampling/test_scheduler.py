"""Times of schedulers against diffusers' own, at any number of steps and tokens."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from twinflow_rt.errors import ConfigError
from twinflow_rt.sampling.schedule import PRESETS, SamplerConfig, preset
from twinflow_rt.sampling.scheduler import DPM, FLOW, MAX_EVALUATIONS, SCM, Scheduler, sampler_of

STEPS = (1, 2, 3, 8, 20, 50, 100)
SOLVER = {"_class_name": DPM, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
CASES = [
    {}, {"shift": 3.0}, {"shift": 6.0, "shift_terminal": 0.05},
    {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"use_dynamic_shifting": True, "shift": 3.0},
]  # fmt: skip


@pytest.mark.parametrize("evenly", [True, False])
@pytest.mark.parametrize("settings", CASES)
def test_flow_times_are_diffusers(settings, evenly):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    ours = Scheduler(dict(theirs.config) | {"_class_name": FLOW}, None, evenly)
    for steps in STEPS:
        if steps == 1 and settings.get("shift_terminal"):
            assert ours.sampler(1, 1024).times == (1.0,)  # where diffusers divides by 0
            continue
        for tokens in (1, 1024, 6889):
            config = theirs.config
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            mu = (tokens - config.base_image_seq_len) * slope + config.base_shift
            how = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if evenly else {"num_inference_steps": steps}
            theirs.set_timesteps(**how, **({"mu": mu} if config.use_dynamic_shifting else {}))
            found = ours.sampler(steps, tokens)
            assert found.mode == "multi" and found.stochast_ratio == 0 and found.network_times is None
            assert np.abs(np.array((*found.times, 0.0)) - theirs.sigmas.numpy()).max() < 2e-7


def test_solver_times_are_diffusers():
    theirs = diffusers.DPMSolverMultistepScheduler(**{k: v for k, v in SOLVER.items() if k != "_class_name"})
    for steps in STEPS:
        theirs.set_timesteps(steps)
        found = Scheduler(SOLVER, None).sampler(steps, 1)
        assert np.array_equal(np.float32((*found.times, 0.0)), theirs.sigmas.numpy())
        assert torch.equal(
            (torch.tensor(found.network_times, dtype=torch.float64) * 1000).round().long(), theirs.timesteps
        )
        assert found.solver == "dpm++2m"


def test_angles_are_diffusers():
    theirs = diffusers.SCMScheduler()
    for steps in STEPS:
        theirs.set_timesteps(steps, max_timesteps=1.5708, intermediate_timesteps=1.3 if steps == 2 else None)
        found = Scheduler({"_class_name": SCM}, None).sampler(steps, 1)
        angles = theirs.timesteps[:-1].double()
        times = (angles.sin() / (angles.sin() + angles.cos())).clamp(max=1)
        assert np.abs(np.array(found.times) - times.numpy()).max() < 2e-7 and found.stochast_ratio == 1


def test_which_sampler_a_call_has():
    own, mine = Scheduler({"_class_name": FLOW, "shift": 3.0}, 8), SamplerConfig(times=(0.5,))
    assert sampler_of(None, None, mine, own, 4) == own.sampler(8, 4)
    assert sampler_of(3, None, mine, own, 4) == own.sampler(3, 4)
    assert sampler_of(None, "any", mine, own, 4) == PRESETS["any"]
    assert sampler_of(None, None, mine, Scheduler(own.settings, None), 4) is mine
    assert sampler_of(None, None, mine, None, 4) is mine and sampler_of(2, None, mine, None, 4) == preset(2)
    with pytest.raises(ConfigError, match="not both"):
        sampler_of(2, "any", mine, own, 4)


@pytest.mark.parametrize("steps", [0, -1, MAX_EVALUATIONS + 1, 10_000, True, 1.5, "4", None])
def test_steps_that_cannot_be(steps):
    with pytest.raises(ConfigError, match="nfe"):
        Scheduler({"_class_name": FLOW}, None).sampler(steps, 4)
