"""Locks that neither a fork nor their own holder can close for good; what a fork breaks, and how it is put right.

The child has one thread. A lock that another one held would never open, so every `Lock` here is open in the child.
GNU OpenMP would wait for its threads forever, so the child computes on one thread, as torch's own data loaders do.
CUDA cannot be used at all; `Pipeline` refuses. A child started by spawn has none of this.

A thread that holds a lock and wants it again, as a callback does that calls the pipeline it is called by, would wait
for itself: it gets a ConfigError. Other threads wait.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

import torch

from ..errors import ConfigError

_thread = threading.local()


def caller() -> int:
    """Return which thread this work is done for: this one, or the one that handed the work to it."""
    return getattr(_thread, "works_for", 0) or threading.get_ident()


@contextmanager
def working_for(thread: int) -> Iterator[None]:
    """Do a block's work in the place of another thread, which waits for it (a `caller()`)."""
    _thread.works_for = thread
    try:
        yield
    finally:
        _thread.works_for = 0


class Lock:
    """A `threading.Lock` that is open in a forked child, and refuses the thread that holds it.

    what: names what it guards in messages. forked: whether this process is a child of the one that made the lock, with
    whatever that lock guards."""

    def __init__(self, what: str = "this object") -> None:
        self.what, self.forked = what, False
        self._lock, self._holder = threading.Lock(), 0
        reopen_in_children(self)

    def acquire(self) -> None:
        """Wait until the lock is open, and close it. Raises ConfigError where this thread has closed it."""
        if self._holder == (thread := caller()):
            raise ConfigError(
                f"{self.what} is running the call that this one is made from (by a callback, say): make it when that "
                "has returned, or load another one for it"
            )
        self._lock.acquire()
        self._holder = thread

    def release(self) -> None:
        """Open the lock; in a child that was forked with it closed, do nothing."""
        if self._holder == caller():
            self._holder = 0
            self._lock.release()

    def reopen_in_child(self) -> None:
        """Replace the lock, whose holder is no thread of this process."""
        self._lock, self._holder, self.forked = threading.Lock(), 0, True

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Reopened(Protocol):
    """What holds a lock that another thread may hold when this process forks."""

    def reopen_in_child(self) -> None:
        """Make the lock anew; called in the child."""


_reopened: weakref.WeakSet[Reopened] = weakref.WeakSet()


def reopen_in_children(thing: Reopened) -> None:
    """Have every forked child call `thing.reopen_in_child()`, for as long as it lives."""
    _reopened.add(thing)


def _in_child() -> None:
    if not _reopened:
        return
    torch.set_num_threads(1)
    for thing in _reopened:
        thing.reopen_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
