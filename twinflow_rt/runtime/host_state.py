"""What a host program has set in torch and must not reach the arithmetic of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch._C import _len_torch_function_stack, _pop_torch_function_stack, _push_on_torch_function_stack

AUTOCAST = ("cpu", "cuda", "mps")  # the device types that autocast is switched for one by one


@contextmanager
def isolated() -> Iterator[None]:
    """Run a block, or as a decorator a function, as a program that has set nothing would, without gradients.

    Kept out: the caller's autocast; its default device, and every other mode that rewrites calls (TorchFunctionMode);
    gradients and inference mode. All belong to the thread, so other threads keep theirs; whoever called has them back
    afterwards. torch's default dtype belongs to the process and stays as it is: the package names the dtype of every
    tensor it makes. What the host asks of all arithmetic stays too (`set_float32_matmul_precision`,
    `use_deterministic_algorithms`, `torch.backends`, threads), and what only watches (dispatch modes, as counters are).
    """
    modes = [_pop_torch_function_stack() for _ in range(_len_torch_function_stack())]
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for device in AUTOCAST:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        for mode in reversed(modes):
            _push_on_torch_function_stack(mode)
