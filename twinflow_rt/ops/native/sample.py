"""The ops of ops/sample.py by the kernels of csrc."""

from __future__ import annotations

from torch import Tensor

from .register import check_like, fresh, like, op, run


@op("x0_project(Tensor x, Tensor velocity, float t=1.0) -> Tensor", like)
def x0_project(x: Tensor, velocity: Tensor, t: float = 1.0) -> Tensor:
    check_like("velocity", x, velocity)
    x, velocity = x.contiguous(), velocity.contiguous()
    out = fresh(x)
    run("x0_project", x, x.data_ptr(), velocity.data_ptr(), out.data_ptr(), x.numel(), t)
    return out
