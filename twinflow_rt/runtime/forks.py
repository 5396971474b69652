"""What a fork breaks in a process that has loaded a model, and how the child is put right.

The child has one thread. A lock that another one held would never open, and GNU OpenMP would wait for
its threads forever, so the child computes on one thread, as torch's own data loaders do. CUDA cannot be
used at all; `Pipeline` refuses. A child started by spawn has none of this.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..pipeline import Pipeline

_pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()


def register(pipe: Pipeline) -> None:
    """Has `pipe` usable in forked children, too."""
    _pipelines.add(pipe)


def _in_child() -> None:
    if not _pipelines:
        return
    torch.set_num_threads(1)
    for pipe in _pipelines:
        pipe._lock, pipe.forked = threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
