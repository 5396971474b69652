"""Inputs and the error rule of the kernel tests."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZED = (torch.float8_e4m3fn, torch.int8)


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


def judge_quantized(got: tuple[Tensor, Tensor], eager: tuple[Tensor, Tensor], exact: Tensor) -> None:
    """Rows (values, scales): what they stand for is judged by the rule, the scale against the exact one."""
    for (values, scales), wanted in zip((got, eager), eager[:1] * 2, strict=True):
        assert values.dtype == wanted.dtype and scales.dtype == torch.float32
        assert values.shape == exact.shape and scales.shape == (*exact.shape[:-1], 1) and values.is_contiguous()
    limit = 127.0 if got[0].dtype == torch.int8 else 448.0
    top = exact.abs().amax(-1, keepdim=True) if exact.numel() else exact.new_empty(got[1].shape)
    torch.testing.assert_close(got[1].double(), top.clamp_min(1e-12) / limit, rtol=2e-6, atol=0)
    judge(*(values.float() * scales for values, scales in (got, eager)), exact)
