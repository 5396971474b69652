"""Where the CPU threads of a call run, and when they end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..ops.native import library


@contextmanager
def placed_threads(device: torch.device) -> Iterator[None]:
    """Keep the caller's OpenMP threads off the CPU it runs on itself, while entered. On leaving without an error they
    end if the process has other Python threads: the next call may come from one of those, and two such teams of
    threads slow each other down. Does nothing for a GPU."""
    with library.threads_apart(device):
        yield
        if device.type == "cpu" and threading.active_count() > 1:
            library.release_threads()
