"""Closing step of the sampler against float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, draw, judge

from twinflow_rt import ops
from twinflow_rt.kernels import launch, sample


@pytest.mark.parametrize("t", [1.0, 0.4, 0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 4, 37, 5), (1, 16, 7, 9), (0, 4, 8, 8)])
def test_x0_project(shape, dtype, t):
    x, velocity = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=3)
    judge(sample.x0_project(x, velocity, t), ops.x0_project(x, velocity, t), x.double() - t * velocity.double())


def test_layouts_and_dtypes_may_differ():
    x, wide = draw(2, 4, 6, 10), draw(2, 6, 10, 9, dtype=torch.bfloat16)
    velocity = wide[..., 2:6].permute(0, 3, 1, 2)
    got = sample.x0_project(x.contiguous(memory_format=torch.channels_last), velocity)
    judge(got, ops.x0_project(x, velocity), x.double() - velocity.double())


def test_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="needs two"):
        sample.x0_project(draw(1, 4, 8, 8), draw(1, 4, 8, 9))


def test_config():
    assert sample.config(5) == launch.Tile(32, 1) and sample.config(16 * 128 * 128) == launch.Tile(512, 4)
