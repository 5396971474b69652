"""Inputs and the error rule of the kernel tests."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same values with gaps of NaN between the rows and between the samples."""
    b, s, d = x.shape
    buffer = torch.full((b, 2 * s + 1, d + 5), torch.nan, dtype=x.dtype)
    view = buffer[:, : 2 * s : 2, 3 : d + 3]
    view.copy_(x)
    return view


def judge(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice the eager reference's error, over all elements; the floor is one unit in the last place."""
    assert got.dtype == eager.dtype and got.shape == eager.shape == exact.shape
    if not exact.numel():
        return
    assert got.isfinite().all()
    worst = lambda x: (x.double() - exact).abs().max().item()
    floor = torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert worst(got) <= 2 * worst(eager) + floor
