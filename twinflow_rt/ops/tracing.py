"""Whether anything beside the caller follows torch's ops, and tables that are kept between calls where nothing does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import _C, Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode

KEPT = 8  # tables of one owner: sizes of images and lengths of prompts met of late


def watched() -> bool:
    """Whether a compiler, a tracer or a dispatch mode (fake tensors, counters) follows what torch is called with."""
    traced = _C._get_tracing_state() is not None
    return is_compiling() or traced or _C._len_torch_dispatch_stack() > 0


def kept_by_a_tape() -> bool:
    """Whether what follows torch is a `runtime.cpu_graph.Recorder`, whose constants may be tables of others."""
    return getattr(_get_current_dispatch_mode(), "keeps_constants", False)


class Tables:
    """Tensors that sizes alone decide, such as rotary angles, made once per size; on a CPU, where making them takes
    longer than some kernels do, and a recorded graph does not own them."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(
        self, key: Hashable, device: torch.device, make: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """make(), or what it gave for this key before."""
        if device.type != "cpu" or (watched() and not kept_by_a_tape()):
            return make()
        found = self._made.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():  # tensors that autograd may meet later
                found = self._made[key] = make()
            while len(self._made) > KEPT:
                self._made.popitem(last=False)
        return found
