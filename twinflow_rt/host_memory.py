"""Resident memory of this process. Imports no torch, so that importing torch can be watched."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Resident memory now; its peak so far where the system does not tell."""
    return status_bytes("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Peak of resident memory since the start, or since it was last reset.

    Not getrusage's where Linux tells better: a new process inherits its parent's there.
    """
    return status_bytes("VmHWM") or _usage()


def status_bytes(key: str) -> int | None:
    """A size in /proc/self/status, None where there is none."""
    if not STATUS.exists():
        return None
    lines = (line for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return next((int(line.split()[1]) * 1024 for line in lines), None)


def _usage() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
