"""Running out of memory: told apart from other failures, and nothing of the failed work kept alive.

torch reports it as `torch.OutOfMemoryError` on a GPU, as a plain RuntimeError of its allocator on a CPU; Python as
MemoryError; oneDNN, when there is no room for the code it generates for a new shape, as "could not create a primitive".

oneDNN's code generator keeps that failure as a state of the thread it happened on: from then on every
shape new to the process is refused there, however much memory is free (oneDNN 3.12). So whatever runs
later on such a thread is handed to a fresh one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import torch

from ..errors import OutOfMemoryError
from ..host_memory import address_space_margin, lacking_address_space, release_free_memory
from .forks import caller, working_for

P = ParamSpec("P")
T = TypeVar("T")

ONEDNN = "could not create a primitive"
ALLOCATORS = (
    "DefaultCPUAllocator", "not enough memory", "std::bad_alloc", "can't start new thread", "Cannot allocate memory",
    "failed to map segment", ONEDNN,
)  # fmt: skip

_thread = threading.local()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory ran out, whoever raised it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error)
    # "could not create a primitive descriptor" is another failure: an operation that does not exist
    return isinstance(error, (RuntimeError, OSError, ImportError)) and any(
        text in message and f"{text} descriptor" not in message for text in ALLOCATORS
    )


def require_address_space(doing: str, files: int = 0, *, threads: bool = True) -> None:
    """Raise OutOfMemoryError where a limit on this process's address space leaves less than `files` bytes to map and
    the margin within which libraries end the process. threads: whether torch's are still to be started."""
    needed = files + address_space_margin(torch.get_num_threads() if threads else 0)
    if lack := lacking_address_space(needed):
        fewer = ", or set OMP_NUM_THREADS lower" if threads else ""
        raise OutOfMemoryError(f"{doing} needs more memory than is free ({lack}{fewer})")


def attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return (work(), None), or (None, why) where memory ran out.

    Then nothing refers to the failed work any more (an exception would, through its traceback), and its
    memory is given back to the system. Other exceptions pass.
    """
    try:
        return _run(work), None
    except (RuntimeError, MemoryError, OSError, ImportError) as error:
        if not is_out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    if ONEDNN in reason:
        _thread.refused = True
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    release_free_memory()
    return None, reason


def halving(
    run: Callable[[int], T], at_once: int, *, split: bool, release: Callable[[], None], what: Callable[[int], str]
) -> tuple[T, int]:
    """Return run(n) and n, the first of `at_once`, its half (rounded up), ... down to 1 for which memory is enough.

    split: else only `at_once` itself is tried. release(): called after each failure; gives up what else holds memory.
    what(n): says that n did not fit, for the OutOfMemoryError where nothing fits. Nothing of a failed run is kept.
    """
    while True:
        result, reason = attempt(partial(run, at_once))
        if reason is None:
            return result, at_once  # type: ignore[return-value]
        release()
        if not split or at_once == 1:
            raise OutOfMemoryError(
                f"{what(at_once)} ({reason}); generate fewer or smaller ones, or pass on_oom='split' (--on-oom split)"
            )
        at_once = -(-at_once // 2)


def named(doing: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function that never returns None: out of memory, it raises OutOfMemoryError, which says
    that `doing` it did not fit, and leaves nothing behind."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            result, reason = attempt(lambda: function(*args, **kwargs))
            if reason is not None:
                raise OutOfMemoryError(
                    f"{doing} needs more memory than is free ({reason}); free some, choose a smaller precision, "
                    "or another device"
                )
            return result  # type: ignore[return-value]

        return run

    return decorate


def _run(work: Callable[[], T]) -> T:
    if not getattr(_thread, "refused", False):
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="twinflow-fresh") as fresh:
        return fresh.submit(working_for(caller())(work)).result()
