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
        feats = torch.cat((x, t[:, None], tt[:, None], (t - tt)[:, None], (t == 1)[:, None].float()), 1)
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
    objective = TwinFlowObjective(model, model, ObjectiveConfig(guidance=0.0), pick=lambda c, m: c, drop=lambda c: c)
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


def test_twin_times_are_told_apart_by_z_image_and_the_papers_are_not():
    from twinflow_rt.models.transformers.z_image import ZImageConfig, ZImageTransformer

    torch.manual_seed(0)
    config = ZImageConfig(
        in_channels=4, dim=48, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=(8, 8, 8), axes_lens=(64, 16, 16),
    )  # fmt: skip
    network = ZImageTransformer(config)
    t = torch.tensor([0.2, 0.7])
    real = network.embed_time(t, t)
    torch.testing.assert_close(network.embed_time(-t, -t), real)
    assert (network.embed_time(*twin_times(t)) - real).abs().max() > 1e-3
