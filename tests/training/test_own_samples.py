"""The flow's own guided samples: the path is followed exactly enough, kept, and regressed on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from twinflow_rt.training.own_samples import Trajectories, draw_times, follow, own_samples, warm_loss

CPU = torch.device("cpu")


def test_times_fall_from_one_to_zero_and_cover_what_lies_between():
    torch.manual_seed(0)
    drawn = torch.stack([draw_times(8) for _ in range(200)])
    assert drawn.shape == (200, 9) and (drawn[:, 0] == 1).all() and (drawn[:, -1] == 0).all()
    assert (drawn.diff(dim=1) < -0.02).all()
    inner = drawn[:, 1:-1].flatten().sort().values
    assert inner.diff().max() < 0.04  # no time is left out


def test_two_steps_in_one_are_of_second_order():
    """dx/dt = x from 1 to 0: x e^-1; twice the steps, a quarter of the error."""
    z = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for steps in (16, 32):
        states = follow(lambda x, t: x, z, torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        assert states.shape == (1, steps + 1, 1, 1, 1)
        errors.append(abs(states[0, -1].item() - torch.e**-1))
    assert errors[0] < 2e-3 and 3.5 < errors[0] / errors[1] < 5


class Pull:
    """A network of known velocity, (x - prompt) / t: every path is a line to the prompt's number."""

    def __init__(self) -> None:
        self.calls = 0

    def encode_context(self, embeds, lengths):
        return embeds[:, 0, 0]

    def modulate(self, t, tt):
        torch.testing.assert_close(t, tt)
        return t

    def __call__(self, x, t, numbers):
        self.calls += 1
        return (x - numbers[:, None, None, None]) / t[:, None, None, None]


def numbers(rows):
    return torch.where(rows < 0, 0.5, rows.float())[:, None, None], torch.ones_like(rows)


def test_samples_end_where_guidance_leads_and_are_made_once(tmp_path):
    network, given = Pull(), dict(steps=3, guidance=2.0, seed=1, log=lambda line: None, device=CPU)
    samples = own_samples(network, numbers, torch.zeros(4, 1, 2, 2), tmp_path, count=5, **given)
    assert samples.states.shape == (5, 4, 1, 2, 2) and samples.times.shape == (5, 4)
    expected = 2 * samples.prompts.float() - 0.5  # beyond the prompt, away from the empty one
    torch.testing.assert_close(samples.states[:, -1].float().mean((1, 2, 3)), expected, atol=2e-2, rtol=0)
    calls = network.calls
    again = own_samples(network, numbers, torch.zeros(4, 1, 2, 2), tmp_path, count=5, **given)
    assert network.calls == calls == 3
    assert torch.equal(again.states, samples.states)


@pytest.mark.parametrize("wrong, positive", [(0.0, False), (0.1, True)])
def test_the_warm_start_asks_for_the_straight_line_between_two_states(wrong, positive):
    """Paths are lines to the prompt's number, whose velocity no jump changes; noise is met at t >= 0.999, tt = 0."""
    torch.manual_seed(0)
    z, times, rows = torch.randn(6, 1, 2, 2), draw_times(4).expand(6, -1), torch.arange(6) % 3
    ends = rows.float()[:, None, None, None]
    states = torch.stack([ends + t * (z - ends) for t in times[0]], 1)
    seen = SimpleNamespace()

    def velocity(x, t, tt, cond):
        seen.t, seen.tt = t, tt
        return (x - cond[0][..., None]) / t.clamp_max(1)[:, None, None, None] + wrong

    loss = warm_loss(velocity, Trajectories(states, times, rows), numbers, 12, CPU)
    assert (loss > 0.09) == positive and (loss < 5e-3) != positive
    assert (seen.t[:8] >= 0.999).all() and (seen.tt[:8] == 0).all()
    assert (seen.tt < seen.t).all() and seen.tt[8:].max() > 0
