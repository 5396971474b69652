"""What a host program has set in torch and must not reach the arithmetic of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

AUTOCAST = ("cpu", "cuda", "mps")  # the device types that autocast is switched for one by one


@contextmanager
def isolated() -> Iterator[None]:
    """Run a block, or as a decorator a function, without the caller's autocast and default device.

    Both belong to the thread, so other threads keep theirs; whoever called has them back afterwards. torch's default
    dtype belongs to the process and stays as it is: the package names the dtype of every tensor it makes. What the
    host asks of all arithmetic stays too: `set_float32_matmul_precision`, `use_deterministic_algorithms`.
    """
    with ExitStack() as stack:
        for device in AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
