"""How much memory a computation needs at its peak, counted on the meta device: nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Live(TorchDispatchMode):
    """Follows every storage that operators make until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or (storage := x.untyped_storage())._cdata in known:
                continue
            known.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


class _Fused(TorchFunctionMode):
    """Attention as its kernels do it: only the result is made, no matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, v = args[0], args[2]
            return q.new_empty((*q.shape[:-1], v.shape[-1]))
        return func(*args, **(kwargs or {}))


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that tensors made by `run` occupy at one time; meant for modules and inputs on the meta device.

    Counts what operators return, as an allocator would without rounding; not what kernels use inside.
    """
    with torch.inference_mode(), _Fused(), _Live() as live:
        result = run()
        del result
    return int(live.peak)
