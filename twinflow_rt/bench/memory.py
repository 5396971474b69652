"""Memory of a stage at its peak: what the device's allocator gave out and held, what the host had resident."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..host_memory import peak_bytes
from ..runtime.timer import synchronize

CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_host_peak() -> bool:
    """Start a new peak of resident memory; return False where only the peak since the start can be had."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def stage_peaks(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Return the bytes at the peak of one call: allocated and reserved on a GPU (None on a CPU), resident on the host.

    `host_peak_is_of_stage` is False where the host's peak is that of the process so far.
    """
    synchronize(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    own = reset_host_peak()
    call()
    synchronize(device)
    return {
        "device_allocated": torch.cuda.max_memory_allocated(device) if cuda else None,
        "device_reserved": torch.cuda.max_memory_reserved(device) if cuda else None,
        "host_resident": peak_bytes(),
        "host_peak_is_of_stage": own,
    }
