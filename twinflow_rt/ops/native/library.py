"""The native libraries: the extension `_native` (CPU) and `libtwinflow_cuda` (NVIDIA GPUs).

Each is loaded on first use. Where one is absent, or cannot serve a target, a sentence says why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..target import Target, either, in_training, no_gpu, off_gpu, other_dtype

ABI_VERSION = 8
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # twinflow_dtype
FORMATS = {torch.int8: 1, torch.float8_e4m3fn: 2}  # twinflow_format
CUDA_LIBRARY = Path(__file__).parents[2] / "libtwinflow_cuda.so"


class CudaKernels:
    """libtwinflow_cuda's kernels under the names and with the arguments of `_native`'s."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.abi_version = self._library.twinflow_cuda_abi_version()
        if self.abi_version != ABI_VERSION:
            return  # `load` refuses it; nothing more is known about its functions
        table, self._message = self._library.twinflow_cuda_kernels, self._library.twinflow_cuda_error_message
        table.restype, self._message.restype = ctypes.c_void_p, ctypes.c_char_p
        message = ctypes.cast(self._message, ctypes.c_void_p).value
        import_module("twinflow_rt._native").bind(self, table(), message)

    def problem(self) -> str | None:
        """Why the current CUDA device cannot run these kernels, in the driver's words, or None."""
        status = self._library.twinflow_cuda_usable()
        return self._message(status).decode() if status else None


@cache
def load(device: str) -> Any:
    """The kernels for a device type, or the reason (a str) why there are none."""
    found: Any
    if device == "cuda":
        if not CUDA_LIBRARY.exists():
            return "built without GPU kernels; reinstall where nvcc is on PATH (TWINFLOW_CUDA=ON insists)"
        if isinstance(extension := load("cpu"), str):
            return extension
        try:
            found = CudaKernels(CUDA_LIBRARY)
        except (OSError, AttributeError) as error:  # AttributeError: a library without these functions
            return f"the GPU kernels do not load: {error}"
    elif device == "cpu":
        try:
            found = import_module("twinflow_rt._native")
        except ImportError as error:
            return f"the native extension is not built here ({error}); `pip install .` builds it"
    else:
        return f"runs on cpu and cuda, not on {device}"
    if found.abi_version != ABI_VERSION:
        return f"the native build has ABI {found.abi_version}, this package needs {ABI_VERSION}; reinstall it"
    return found


def unavailable_reason(device: str = "cpu") -> str | None:
    """Why there are no native kernels for `device` ("cpu" or "cuda") in this installation, or None."""
    found = load(device)
    return found if isinstance(found, str) else None


def release_threads() -> bool:
    """End the OpenMP threads that wait for this thread's next kernel, torch's or ours, and return whether that was
    done; the next kernel starts new ones. Two threads with such teams slow each other down: see
    twinflow_cpu_release_threads in twinflow_rt.h.

    Nothing is ended where torch computes on one thread: OpenMP has no team then, or, in a forked child, would wait for
    threads that the fork did not copy."""
    kernels = load("cpu")
    return torch.get_num_threads() > 1 and not isinstance(kernels, str) and bool(kernels.release_threads())


@contextmanager
def threads_apart(device: torch.device) -> Iterator[None]:
    """Keep the other threads that compute with this one on the CPU off the CPU that it runs on, until the context ends:
    see twinflow_cpu_threads_apart in twinflow_rt.h. Then they have the affinity that they had; its own is not touched.
    Nothing is done for another device, or where torch computes on one thread."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    kernels: Any = load("cpu") if threads > 1 else "not needed"
    apart = not isinstance(kernels, str) and kernels.threads_apart(threads)
    try:
        yield
    finally:
        if apart:
            kernels.threads_together()


def unusable_reason() -> str | None:
    """Why the GPU kernels of this installation cannot run on this machine, or None."""
    if reason := unavailable_reason("cuda") or no_gpu():
        return reason
    problem = load("cuda").problem()
    return f"the driver refuses the GPU kernels: {problem}" if problem else None


_other_dtype = either(other_dtype("stores float32 or bfloat16", *DTYPES), in_training)


def refuses(target: Target) -> str | None:
    """Why the CPU kernels cannot serve `target`, or None."""
    if target.device != "cpu":
        return f"runs on the CPU, not on {target.device}"
    return _other_dtype(target) or unavailable_reason()


def cuda_refuses(target: Target) -> str | None:
    """Why the GPU kernels cannot serve `target`, or None."""
    return off_gpu(target) or _other_dtype(target) or unusable_reason()
