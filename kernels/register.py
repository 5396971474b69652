"""How a launcher becomes a torch op: torch.compile and CUDA graphs see one opaque call, with the shapes of its
results and what it writes declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("twinflow", "FRAGMENT")
_names: set[str] = set()


def torch_op(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a launcher as `twinflow::triton_<schema>` and returns that op; the launcher itself is its `launch`.

    fake: called as the launcher, gives tensors of the results' shapes, strides and dtypes. It is what torch calls
    where nothing is computed. One file may be imported under two names, `kernels.norm` and `twinflow_rt.kernels.norm`:
    both have the op of the first.
    """
    name = f"triton_{schema.partition('(')[0]}"

    def register(launch: Callable[..., Any]) -> Any:
        if name in _names or not hasattr(torch.ops.twinflow, name):
            _library.define(f"triton_{schema}")
            # every device: Triton's own interpreter runs these on the CPU
            _library.impl(name, launch, "CompositeExplicitAutograd")
            torch.library.register_fake(f"twinflow::{name}", fake, lib=_library)
            _names.add(name)
        op = getattr(torch.ops.twinflow, name).default
        op.launch, op.__doc__ = launch, launch.__doc__
        return op

    return register


def like(x: Tensor, *_: object) -> Tensor:
    """An uninitialised tensor of x's shape and dtype, contiguous."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def image_like(x: Tensor, *_: object, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [B, C, H, W] of x's shape, channels last, in `dtype` or x's."""
    b, c, h, w = x.shape
    return torch.empty(b, h, w, c, dtype=dtype or x.dtype, device=x.device).permute(0, 3, 1, 2)
