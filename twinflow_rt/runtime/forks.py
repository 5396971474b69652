"""What a fork breaks in a process that has loaded a model, and how the child is put right.

The child has one thread. A lock that another one held would never open, so every `Lock` here is open in the child.
GNU OpenMP would wait for its threads forever, so the child computes on one thread, as torch's own data loaders do.
CUDA cannot be used at all; `Pipeline` refuses. A child started by spawn has none of this.
"""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType

import torch


class Lock:
    """A `threading.Lock` that is open in a forked child. forked: whether this process is a child of the one that made
    the lock, with whatever that lock guards."""

    def __init__(self) -> None:
        self.forked = False
        self._lock = threading.Lock()
        _locks.add(self)

    def acquire(self) -> None:
        """Wait until the lock is open, and close it."""
        self._lock.acquire()

    def release(self) -> None:
        """Open the lock."""
        self._lock.release()

    def reopen_in_child(self) -> None:
        """Replace the lock, whose holder is no thread of this process."""
        self._lock, self.forked = threading.Lock(), True

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _in_child() -> None:
    if not _locks:
        return
    torch.set_num_threads(1)
    for lock in _locks:
        lock.reopen_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
