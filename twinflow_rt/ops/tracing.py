"""Cache tensors that depend on sizes only (rotary tables); disabled while torch is tracing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import _C, Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode

KEPT = 8  # tables of one cache: the latest sizes of images and lengths of prompts


def watched() -> bool:
    """Whether a compiler, a tracer or a dispatch mode (fake tensors, counters) follows what torch is called with."""
    traced = _C._get_tracing_state() is not None
    return is_compiling() or traced or _C._len_torch_dispatch_stack() > 0


def _recorded() -> bool:
    """Whether what follows torch is a `runtime.cpu_graph.Recorder`, whose constants may be tables of others."""
    return getattr(_get_current_dispatch_mode(), "keeps_constants", False)


class TableCache:
    """Pairs of tensors that depend on sizes only, made once per size. On a CPU alone, where making them takes longer
    than some kernels do, and where a recorded graph does not own them."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(
        self, key: Hashable, device: torch.device, make: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return what `make()` gave for this key before, or make it."""
        if device.type != "cpu" or (watched() and not _recorded()):
            return make()
        found = self._made.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():  # tensors that autograd may meet later
                found = self._made[key] = make()
            while len(self._made) > KEPT:
                self._made.popitem(last=False)
        return found
