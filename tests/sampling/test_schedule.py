"""Sampler settings, presets, time grids and schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from twinflow_rt.errors import ConfigError
from twinflow_rt.sampling.schedule import PRESETS, SamplerConfig, preset, schedule, steps, time_grid

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def test_start_time_rounds_to_one_in_bfloat16():
    config = PRESETS["2"]
    assert time_grid(config, torch.bfloat16) == (1.0, 0.6015625, 0.0)
    assert time_grid(config, torch.float32)[0] == float(np.float32(0.999))
    assert abs(time_grid(config, torch.float64)[0] - 0.999) < 1e-15
    assert schedule(config, torch.bfloat16) == ((1.0, 0.0), (0.6015625, 0.0))


def test_target_times():
    def times(mode, order=1):
        config = SamplerConfig(3, sampling_order=order, rfba_gap_steps=(0.25, 0.25), mode=mode)
        return schedule(config, torch.float32)

    assert times("few") == ((0.75, 0.0), (0.5, 0.0), (0.25, 0.0))
    assert times("any") == ((0.75, 0.5), (0.5, 0.25), (0.25, 0.0))
    assert times("multi") == ((0.75, 0.75), (0.5, 0.5), (0.25, 0.25))
    assert times("few", 2) == ((0.75, 0.0), (0.25, 0.0), (0.25, 0.0))
    assert times("any", 2) == ((0.75, 0.25), (0.25, 0.25), (0.25, 0.0))
    assert times("multi", 2) == ((0.75, 0.75), (0.25, 0.25), (0.25, 0.25))


def test_presets_are_the_released_settings():
    flat = (1.0, 1.0, 1.0)
    assert PRESETS["2"] == SamplerConfig(2, 1.0, 0.0, 1, flat, (0.001, 0.6), "few")
    assert PRESETS["4"] == SamplerConfig(4, 1.0, 0.0, 1, flat, (0.001, 0.5), "few")
    assert PRESETS["any"] == SamplerConfig(4, 0.0, 0.0, 1, flat, (0.001, 0.5), "any")
    assert PRESETS["multi"] == SamplerConfig(30, 0.0, 0.0, 1, (1.17, 0.8, 1.1), (0.001, 0.0), "multi")
    for dtype in DTYPES:
        assert schedule(PRESETS["1"], dtype) == ((1.0, 0.0),)


@pytest.mark.parametrize("dtype", DTYPES)
def test_preset_spends_exactly_its_evaluations(dtype):
    small, large = range(1, 9), (9, 20, 30, 60, 61, 80, 100)
    for mode, counts in (("few", small), *((m, (*small, *large)) for m in ("any", "multi", None))):
        for nfe in counts:
            config = preset(nfe, mode)
            assert len(schedule(config, dtype)) == nfe
            grid = time_grid(config, dtype)
            assert grid[-1] == 0 and list(grid) == sorted(grid, reverse=True)
            if dtype != torch.bfloat16 or nfe <= 60:  # beyond, bfloat16 merges times near 1
                assert len(set(grid)) == nfe + 1
    assert [preset(n).mode for n in (1, 8, 9)] == ["few", "few", "multi"]
    for name in ("1", "2", "4"):
        assert preset(int(name)) == PRESETS[name]
    assert preset(4, "any") == PRESETS["any"] and preset(30, "multi") == PRESETS["multi"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sampling_steps", 0), ("sampling_steps", 2.0), ("sampling_steps", True),
        ("sampling_steps", 1001), ("stochast_ratio", -0.1), ("stochast_ratio", 1.1),
        ("stochast_ratio", "sde"), ("stochast_ratio", math.nan), ("stochast_ratio", None),
        ("extrapol_ratio", -1), ("extrapol_ratio", math.inf), ("extrapol_ratio", "0"),
        ("sampling_order", 3), ("sampling_order", True), ("sampling_order", 1.0),
        ("time_dist_ctrl", (1, 1)), ("time_dist_ctrl", (1, 1, 0)), ("time_dist_ctrl", 1.0),
        ("time_dist_ctrl", (1, 1, math.nan)), ("rfba_gap_steps", (0.5, 0.5)),
        ("rfba_gap_steps", (-0.1, 0.5)), ("rfba_gap_steps", (0.1,)), ("rfba_gap_steps", "01"),
        ("mode", "mul"), ("mode", None),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field):
        SamplerConfig(**{field: value})


@pytest.mark.parametrize(("nfe", "mode"), [(0, None), (101, None), (9, "few"), (2.0, None), (True, None), ("2", None)])
def test_bad_nfe_is_refused(nfe, mode):
    with pytest.raises(ConfigError, match="nfe"):
        preset(nfe, mode)


def test_bad_mode_is_refused():
    with pytest.raises(ConfigError, match="mode"):
        preset(2, "fast")


def test_settings_read_from_lists_are_hashable():
    config = SamplerConfig(2, time_dist_ctrl=[1, 1, 1], rfba_gap_steps=[0.001, 0.6])
    assert hash(config) == hash(SamplerConfig(2, rfba_gap_steps=(0.001, 0.6)))
    assert steps(config, torch.float32) is steps(config, torch.float32)


def test_given_times_are_the_schedule():
    config = SamplerConfig(times=[1.0, 0.7, 0.1], network_times=(1, 0.699, 0.1), mode="multi")
    assert config.sampling_steps == config.intervals == 3 and config.times == (1.0, 0.7, 0.1)
    for dtype in DTYPES:
        assert schedule(config, dtype) == ((1.0, 1.0), (0.699, 0.699), (0.1, 0.1))
        assert [step.t for step in steps(config, dtype)] == [1.0, 0.7, 0.1]
    assert schedule(SamplerConfig(times=(0.5, 0.2)), torch.bfloat16) == ((0.5, 0.0), (0.2, 0.0))
    assert schedule(SamplerConfig(times=(0.5, 0.2), mode="any"), torch.bfloat16) == ((0.5, 0.2), (0.2, 0.0))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"times": ()}, "times"), ({"times": (0.5, 0.5)}, "times"), ({"times": (1.5, 0.5)}, "times"),
        ({"times": (0.5, 0.0)}, "times"), ({"times": (math.nan, 0.1)}, "times"), ({"times": 0.5}, "times"),
        ({"times": (0.9, 0.1), "sampling_steps": 3}, "sampling_steps"),
        ({"times": (0.9, 0.1), "rfba_gap_steps": (0.1, 0)}, "rfba_gap_steps"),
        ({"times": (0.9, 0.1), "sampling_order": 2}, "sampling_order"),
        ({"times": (0.9, 0.1), "network_times": (0.9,)}, "network_times"),
        ({"times": (0.9, 0.1), "network_times": (0.9, -1)}, "network_times"),
        ({"network_times": (0.9,)}, "network_times"),
        ({"solver": "dpm++2m"}, "solver"), ({"times": (0.9, 0.1), "solver": "heun"}, "solver"),
    ],
)  # fmt: skip
def test_given_times_that_cannot_be(settings, named):
    with pytest.raises(ConfigError, match=named):
        SamplerConfig(**settings)
