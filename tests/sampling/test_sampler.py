"""The sampler: closed forms, the one-step path, the caller's hooks."""

from __future__ import annotations

import itertools

import pytest
import torch

from twinflow_rt.errors import CancelledError, ConfigError
from twinflow_rt.sampling.noise import initial_noise, step_noise
from twinflow_rt.sampling.sampler import _integrate, _Network, from_function, sample
from twinflow_rt.sampling.schedule import PRESETS, SamplerConfig, preset, schedule, steps, time_grid

SHAPE = (2, 3, 2, 2)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def network(latents, t, tt):
    """A smooth nonlinear stand-in for the model that mixes positions and uses both times."""
    t, tt = (v.to(latents.dtype).view(-1, 1, 1, 1) for v in (t, tt))
    return torch.tanh(latents * (0.7 + 0.3 * t - 0.2 * tt)) + 0.1 * latents.roll(1, -1) - 0.3 * t


def fresh(i):
    return step_noise([3, 4], i, SHAPE[1:])


# -- closed form: data N(MU, SIGMA^2) in every coordinate -----------------------------------------

MU, SIGMA = 0.7, 0.4


def variance(t):
    return t**2 + (1 - t) ** 2 * SIGMA**2


def transport(x, t, to):
    """The exact probability flow from time t to `to`."""
    ratio = (variance(to) / variance(t)) ** 0.5
    return (1 - to) * MU + ratio * (x - (1 - t) * MU)


def exact_velocity(x, t, tt):
    """E[z - x | x_t], the instantaneous velocity of the flow."""
    t = t.view(-1, 1, 1, 1)
    return -MU + (t - (1 - t) * SIGMA**2) / variance(t) * (x - (1 - t) * MU)


def exact_average(x, t, tt):
    """(x_t - x_tt) / (t - tt): what a perfect any-step network returns."""
    t, tt = t.view(-1, 1, 1, 1), tt.view(-1, 1, 1, 1)
    return (x - transport(x, t, tt)) / (t - tt)


def flow_error(n, order):
    config = SamplerConfig(n, sampling_order=order, rfba_gap_steps=(0.3, 0.0), mode="multi")
    noise = torch.linspace(-2, 2, 24, dtype=torch.float64).view(2, 3, 2, 2)
    out = sample(from_function(exact_velocity, config), noise, config)
    return (out - transport(noise, 0.7, 0.0)).abs().max().item()


def test_multi_step_sampling_converges_to_the_flow():
    first = [flow_error(n, 1) for n in (60, 120, 240)]
    second = [flow_error(2 * n, 2) for n in (60, 120, 240)]
    for coarse, fine in itertools.pairwise(first):
        assert 1.8 < coarse / fine < 2.2
    for coarse, fine in itertools.pairwise(second):
        assert 3.6 < coarse / fine < 4.8
    assert second[-1] < 3e-6 < 1e-3 < first[-1] < 1e-2


@pytest.mark.parametrize("n", range(1, 9))
def test_a_perfect_any_step_network_is_sampled_exactly(n):
    config = preset(n, "any")
    noise = initial_noise([1], (3, 4, 4), torch.float64)
    out = sample(from_function(exact_average, config), noise, config)
    start = time_grid(config, torch.float64)[0]
    assert (out - transport(noise, start, 0.0)).abs().max() < 1e-12


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_few_step_presets_keep_the_data_distribution(nfe):
    config = preset(nfe)
    shape = (3, 128, 128)
    noise = initial_noise([1, 2], shape, torch.float64)
    out = sample(
        from_function(exact_average, config), noise, config,
        noise_fn=lambda i: step_noise([1, 2], i, shape),
    )  # fmt: skip
    assert abs(out.mean() - MU) < 5e-3 and abs(out.std() - SIGMA) < 5e-3


def test_sde_sampling_keeps_the_data_distribution():
    config = SamplerConfig(200, stochast_ratio="SDE", rfba_gap_steps=(0.0, 0.0), mode="multi")
    shape = (3, 64, 64)
    noise = initial_noise([1], shape, torch.float64)
    out = sample(
        from_function(exact_velocity, config), noise, config,
        noise_fn=lambda i: step_noise([1], i, shape),
    )  # fmt: skip
    assert abs(out.mean() - MU) < 0.03 and abs(out.std() - SIGMA) < 0.03


def test_order_two_from_the_very_start_stays_finite():
    config = SamplerConfig(8, sampling_order=2, rfba_gap_steps=(0.001, 0.0), mode="multi")
    counts = {dtype: len(schedule(config, dtype)) for dtype in DTYPES}
    assert counts == {torch.float64: 7, torch.float32: 7, torch.bfloat16: 6}
    noise = initial_noise([1], (3, 8, 8), torch.bfloat16)
    out = sample(from_function(exact_velocity, config), noise, config).double()
    assert (out - transport(noise.double(), 1.0, 0.0)).abs().max() < 0.2


# -- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1, 2])
def test_one_step_is_its_formula(dtype, order):
    config = SamplerConfig(1, sampling_order=order)
    noise = initial_noise([1, 2], SHAPE[1:], dtype)
    out = sample(from_function(network, config), noise, config)
    flow = network(noise, torch.ones(2), torch.zeros(2))
    assert torch.equal(out, (noise.double() - flow.double()).to(dtype))
    assert schedule(config, dtype) == ((1.0, 0.0),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [0.0, 0.001, 0.2])
def test_fast_path_agrees_with_the_general_path(dtype, gap):
    config = SamplerConfig(1, rfba_gap_steps=(gap, 0.5))
    noise = initial_noise([1, 2], SHAPE[1:], dtype)
    t = time_grid(config, dtype)[0]
    velocity = from_function(network, config)
    fast = sample(velocity, noise, config)
    general = _integrate(_Network(velocity, 1, None, None), noise, steps(config, dtype), 0.0, None)
    flow = velocity(noise, 0)
    eps = torch.finfo(dtype).eps
    assert ((fast - general).abs() <= eps * (noise.abs() + 2 * flow.abs())).all()
    exact = noise.double() - t * flow.double()
    assert (fast.double() - exact).abs().max() <= (general.double() - exact).abs().max()
    if t == 1:
        assert torch.equal(fast, general)


def test_fast_path_is_one_call_and_one_projection():
    noise, calls = initial_noise([1, 2], SHAPE[1:], torch.bfloat16), []

    def velocity(latents, index):
        calls.append(("velocity", index, latents is noise))
        return torch.zeros_like(latents)

    def project(x, flow, t):
        calls.append(("project", t, x is noise))
        return x

    assert sample(velocity, noise, PRESETS["1"], project=project) is noise
    assert calls == [("velocity", 0, True), ("project", 1.0, True)]


def test_nothing_waits_for_the_device():
    """On the meta device reading a value fails, so any hidden synchronisation would raise."""
    noise = torch.empty(SHAPE, dtype=torch.bfloat16, device="meta")
    for config in (PRESETS["1"], PRESETS["4"], SamplerConfig(7, "SDE", 0.3, 2, mode="multi")):
        out = sample(
            from_function(lambda x, t, tt: x.neg(), config), noise, config,
            noise_fn=lambda i: torch.empty(SHAPE, device="meta"), callback=lambda *_: None,
        )  # fmt: skip
        assert out.shape == noise.shape and out.dtype == noise.dtype


# -- the caller's hooks --------------------------------------------------------------------------


def test_callback_sees_every_evaluation():
    config = SamplerConfig(7, sampling_order=2, rfba_gap_steps=(0.05, 0.0), mode="multi")
    noise, seen = initial_noise([1, 2], SHAPE[1:], torch.bfloat16), []
    out = sample(from_function(network, config), noise, config, callback=lambda *args: seen.append(args))
    assert [s[:2] for s in seen] == [(k, 7) for k in range(1, 8)]
    assert torch.equal(seen[-1][2], out)
    one = PRESETS["1"]
    seen.clear()
    out = sample(from_function(network, one), noise, one, callback=lambda *a: seen.append(a))
    assert len(seen) == 1 and seen[0][:2] == (1, 1) and torch.equal(seen[0][2], out)


@pytest.mark.parametrize("name", ["1", "4"])
def test_cancel_stops_before_the_next_evaluation(name):
    config, calls = PRESETS[name], []
    noise = initial_noise([1, 2], SHAPE[1:])
    for limit in range(config.sampling_steps):
        calls.clear()

        def velocity(latents, index):
            calls.append(index)
            return torch.zeros_like(latents)

        with pytest.raises(CancelledError, match=f"after {limit} of {config.sampling_steps}"):
            sample(velocity, noise, config, noise_fn=fresh, cancel=lambda: len(calls) >= limit)  # noqa: B023
        assert calls == list(range(limit))


def test_missing_noise_is_refused_before_any_work():
    def velocity(latents, index):
        raise AssertionError("the network must not run")

    with pytest.raises(ConfigError, match="noise_fn"):
        sample(velocity, initial_noise([1], SHAPE[1:]), PRESETS["2"])


def test_noise_streams_are_asked_for_once_and_in_order():
    asked = []

    def recorded(i):
        asked.append(i)
        return fresh(i)

    config = PRESETS["4"]
    sample(from_function(network, config), fresh(0), config, noise_fn=recorded)
    assert asked == [1, 2, 3]


def test_wrong_velocity_shape_is_refused():
    with pytest.raises(ConfigError, match="velocity returned shape"):
        sample(lambda x, i: x[:1], initial_noise([1, 2], SHAPE[1:]), PRESETS["1"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_unusable_dtype_is_refused(dtype):
    with pytest.raises(ConfigError, match="the sampler works in"):
        sample(lambda x, i: x, torch.zeros(SHAPE, dtype=dtype), PRESETS["1"])


def test_no_graph_is_recorded():
    weight = torch.ones((), requires_grad=True)
    out = sample(lambda x, i: x * weight, initial_noise([1], SHAPE[1:]), PRESETS["1"])
    assert not out.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_sampling_does_not_synchronise():
    noise = initial_noise([1, 2], SHAPE[1:], torch.bfloat16, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for config in (PRESETS["1"], PRESETS["4"]):
            sample(
                from_function(network, config), noise, config,
                noise_fn=lambda i: step_noise([1, 2], i, SHAPE[1:], device="cuda"),
            )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_wider_velocity_is_accepted():
    noise = initial_noise([1, 2], SHAPE[1:], torch.bfloat16)
    for config in (PRESETS["1"], PRESETS["4"]):
        out = sample(lambda x, i: x.float() * 0.3, noise, config, noise_fn=fresh)
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
