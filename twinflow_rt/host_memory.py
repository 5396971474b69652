"""Memory of this process: how much is resident, and what the C library does with what is freed. Imports no torch,
so that importing torch can be watched."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STATUS = "/proc/self/status"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20  # that glibc takes
DEFAULT_THRESHOLD = 128 << 10  # glibc's, both
HUGE = 4 << 20  # bytes: smaller blocks have few huge pages, or none
MARGIN, MARGIN_OF_THREAD = 256 << 20, 80 << 20  # bytes, see `address_space_margin`
MADV_HUGEPAGE = 14  # of Linux' mman.h


def resident_bytes() -> int:
    """Resident memory now; its peak so far where the system does not tell."""
    return status_bytes("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Peak of resident memory since the start, or since it was last reset.

    Not getrusage's where Linux tells better: a new process inherits its parent's there.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return status_bytes("VmHWM") or (usage if sys.platform == "darwin" else usage * 1024)


def status_bytes(key: str) -> int | None:
    """A size in /proc/self/status, None where there is none."""
    try:
        file = os.open(STATUS, os.O_RDONLY)  # every stage of every image asks: no layers above the system's calls
    except FileNotFoundError:
        return None
    try:
        text = os.read(file, 1 << 16)
    finally:
        os.close(file)
    start = text.find(f"\n{key}:".encode())
    return int(text[start + len(key) + 2 :].split(None, 1)[0]) * 1024 if start >= 0 else None


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, now; outside Linux its peak resident memory."""
    if not sys.platform.startswith("linux"):
        return peak_bytes()
    with open("/proc/self/statm", encoding="ascii") as file:
        resident, shared = map(int, file.read().split()[1:3])
    return (resident - shared) * resource.getpagesize()


def lacking_address_space(needed: int) -> str | None:
    """Return what is lacking where a limit (`ulimit -v`) leaves this process less than `needed` bytes, or None."""
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], status_bytes("VmSize")
    if limit == resource.RLIM_INFINITY or used is None or limit - used >= needed:
        return None
    least = (-(-(used + needed) >> 24) + 1 << 24) // 1024  # in `ulimit -v`'s KB; what is used differs between runs
    left = max(limit - used, 0)
    return f"{left >> 20:,} of {needed >> 20:,} MB of address space are left; raise `ulimit -v` to at least {least}"


def address_space_margin(threads: int) -> int:
    """Return the bytes of address space that a process with torch needs beside a model's files and its images.

    Threads have a stack and an arena of malloc's each; code is made for every shape. With less, oneDNN's generator ends
    the process by a segmentation fault, and other libraries by messages of their own. Measured with the miniature: 231
    MB with one thread, 303 with two (docs/reliability.md).
    """
    return MARGIN + threads * MARGIN_OF_THREAD


def torch_bytes() -> int:
    """Return how much address space importing torch takes at least, without importing it; 0 where it is imported."""
    spec = None if "torch" in sys.modules else find_spec("torch")
    places = (spec and spec.submodule_search_locations) or ()
    return sum(file.stat().st_size for place in places for file in Path(place, "lib").glob("*.so*"))


def release_free_memory() -> None:
    """Returns freed memory to the system, where the C library has a call for that (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_freed_memory() -> bool:
    """Has malloc keep up to 64 MB of freed memory instead of returning it at once; whether it does now.

    Else an image's intermediate results are given back to the system and faulted in again, page by page, with every
    image. These are the thresholds that glibc's own adjustment ends at once a block of 32 MB was freed. They are the
    process's, so a setting of the user's (MALLOC_*_, GLIBC_TUNABLES) stays.
    """
    theirs = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
    if any(name in os.environ for name in theirs) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    return _set_thresholds(LARGEST_MMAP_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)


def return_freed_memory() -> None:
    """Has malloc give tensors of 1 MB and more back to the system when they are freed, for the rest of this process:
    it would keep the place of smaller ones, and what is resident would exceed what is used. A page fault more per page
    is what it costs. Takes back what `keep_freed_memory` said."""
    _set_thresholds(DEFAULT_THRESHOLD, DEFAULT_THRESHOLD)


def prefer_huge_pages(address: int, nbytes: int) -> None:
    """Asks the system to back a large block (`HUGE`) that was just allocated by pages of 2 MB. Blocks beyond 32 MB are
    always new to a process, and filling them costs more in faults of small pages than in writing. A wish: nothing
    depends on whether it is granted."""
    if (madvise := _madvise()) is not None:
        first, end = -address % mmap.PAGESIZE + address, (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(first, end - first, MADV_HUGEPAGE)


@cache
def _madvise() -> Any:
    """Linux' call, or None elsewhere."""
    madvise = _of_linux("madvise")
    if madvise is not None:
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def _set_thresholds(mapped: int, trim: int) -> bool:
    """malloc's thresholds in bytes; whether it took them (glibc's does)."""
    mallopt = _of_linux("mallopt")
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, mapped)) and bool(mallopt(M_TRIM_THRESHOLD, trim))


def _of_linux(name: str) -> Any:
    """A function of the C library, or None where there is none or the system is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
