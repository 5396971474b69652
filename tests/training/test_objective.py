"""The TwinFlow objective on a distribution whose answer is known: two points, +1 and -1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from twinflow_rt.training.objective import ObjectiveConfig, TwinFlowObjective, flow_matching_loss, twin_times


class Toy(nn.Module):
    """F(x_t, t, tt) of one number, by an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x, t, tt, cond):
        x = x.flatten(1)
        feats = torch.cat((x, t[:, None], tt[:, None], (t - tt)[:, None], (t > 0.995)[:, None].float()), 1)
        return self.net(feats)[..., None, None]


def data(n: int) -> torch.Tensor:
    return (torch.randint(0, 2, (n,)) * 2.0 - 1 + 0.05 * torch.randn(n))[:, None, None, None]


def one_step(model: nn.Module, t: float, tt: float, n: int = 2048) -> torch.Tensor:
    z, one = torch.randn(n, 1, 1, 1), torch.ones(n)
    with torch.no_grad():
        return z - model(z, t * one, tt * one, None)


def train(loss, model: nn.Module, steps: int, lr: float = 3e-3) -> None:
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * (1 - step / steps)
        opt.zero_grad()
        loss().backward()
        opt.step()


def pretrained() -> Toy:
    torch.manual_seed(0)
    model = Toy()

    def loss():
        return flow_matching_loss(model, data(256), torch.rand(256), None)

    train(loss, model, 600)
    return model


def test_one_step_sampling_learns_both_modes_that_flow_matching_averages():
    model = pretrained()
    before = one_step(model, 0.99, 0.99).abs().mean()
    objective = TwinFlowObjective(model, model, ObjectiveConfig(guidance=0.0), pick=lambda c, m: c, drop=lambda c, m: c)
    train(lambda: objective(data(256), None)[0], model, 600, lr=1e-3)
    x = one_step(model, 1.0, 0.0)
    assert before < 0.5  # one Euler step of a plain flow lands near the mean, 0
    assert x.abs().mean() > 0.8
    assert 0.3 < (x > 0).float().mean() < 0.7


def test_parts_split_the_batch_as_configured():
    objective = TwinFlowObjective(None, None, ObjectiveConfig(parts=(1, 1, 1, 0)), None, None)
    masks = objective._split(9, torch.device("cpu"))
    assert [int(m.sum()) for m in masks] == [3, 3, 3, 0]
    assert torch.stack(masks).sum(0).eq(1).all()


@pytest.mark.parametrize("short", [False, True])
def test_exact_flow_of_a_point_is_a_fixed_point_of_the_jump_target(short):
    """For data at a single point m, F = (x_t - m) / t is exact for every (t, tt): no residual."""

    def exact(x, t, tt, cond):
        return (x - 0.3) / t[:, None, None, None]

    objective = TwinFlowObjective(exact, exact, ObjectiveConfig(), None, None)
    torch.manual_seed(1)
    t = torch.rand(64) * 0.8 + 0.2
    tt = t - 0.005 if short else t * torch.rand(64) * 0.9 + 0.05
    z = torch.randn(64, 1, 1, 1)
    x_t = t[:, None, None, None] * z + (1 - t[:, None, None, None]) * 0.3
    velocity = exact(x_t, t, tt, None)
    target = objective._rcgm_target(velocity, z - 0.3, x_t, t, tt, None)
    torch.testing.assert_close(target, velocity, atol=2e-4, rtol=0)


def embed_time(t: torch.Tensor, tt: torch.Tensor) -> torch.Tensor:
    from twinflow_rt.models.transformers.z_image import ZImageConfig, ZImageTransformer

    torch.manual_seed(0)
    config = ZImageConfig(
        in_channels=4, dim=48, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=(8, 8, 8), axes_lens=(64, 16, 16),
    )  # fmt: skip
    with torch.no_grad():
        return ZImageTransformer(config).embed_time(t, tt)


def test_twin_times_are_told_apart_by_z_image_and_the_papers_are_not():
    """From the velocity, and from the jump to the end, at every time: the flag must not fade towards t = 1."""
    t = torch.tensor([0.2, 0.7, 0.99])
    real, twin, end = embed_time(t, t), embed_time(*twin_times(t)), embed_time(t, 0 * t)
    torch.testing.assert_close(embed_time(-t, -t), real)
    distance = lambda a, b: (a - b).norm(dim=1) / real.norm(dim=1)
    assert (distance(twin, real) > 0.5).all() and (distance(twin, end) > 0.3).all()


class Recorder:
    """A velocity of zeros that notes at which times, and with which prompts (numbers), it was asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, x, t, tt, cond):
        self.seen.append((t, tt, cond))
        return (0 * x).requires_grad_()


def test_times_and_prompts_of_the_parts():
    torch.manual_seed(0)
    current, target = Recorder(), Recorder()
    config = ObjectiveConfig(parts=(1, 1, 1, 1), to_end=0.5, latest=0.9, drop_prompt=0.5)
    drop = lambda cond, mask: cond.masked_fill(mask, -1)
    prompts = torch.arange(64)
    TwinFlowObjective(current, target, config, pick=lambda c, m: c[m], drop=drop)(torch.randn(64, 1, 2, 2), prompts)
    _, (t, tt, asked), fake, real = current.seen  # the twin's samples; the batch; the rectification's two
    e2e, mul, jump, twin = (slice(16 * i, 16 * i + 16) for i in range(4))
    assert (t[e2e] >= 0.999).all() and (tt[e2e] == 0).all()
    assert (t[16:] <= 0.9).all() and (tt[twin] == t[twin] - 1).all()
    assert 3 <= (tt[jump] == 0).sum() <= 13  # few-step sampling takes them
    assert 3 <= (asked[mul] == -1).sum() <= 13 and (asked[mul] == -1).sum() == (asked == -1).sum()
    (with_prompt, *_), (without, *_) = target.seen[0], target.seen[1]
    assert with_prompt.max() <= 0.9 and without.max() <= 0.9  # guidance compares velocities, not one-step maps
    assert (target.seen[1][2] == -1).all()
    assert real[0].max() <= 0.9 and torch.equal(fake[1], fake[0] - 1)


def test_rectification_stops_pulling_where_the_two_velocities_meet():
    gradients = []
    for gap in (0.1, 0.01):
        velocity = lambda x, t, tt, cond, gap=gap: gap * (tt < 0).float()[:, None, None, None] + 0 * x
        objective = TwinFlowObjective(velocity, velocity, ObjectiveConfig(), None, None)
        F = torch.zeros(4, 1, 2, 2, requires_grad=True)
        objective._rectify(torch.randn(4, 1, 2, 2), F, None).backward()
        gradients.append(F.grad.abs().mean())
    torch.testing.assert_close(gradients[0], 10 * gradients[1])
