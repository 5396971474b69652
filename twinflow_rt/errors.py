"""The exception tree: every failure a caller can cause or meet is a `TwinFlowError`.

Each message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class TwinFlowError(Exception):
    """Base of every error that twinflow_rt raises on purpose."""


class CheckpointError(TwinFlowError):
    """A model folder cannot be used: missing or unknown keys, wrong shapes or family,
    an unreadable or truncated file, a pickle."""


class ConfigError(TwinFlowError, ValueError):
    """An argument has a value that cannot work (size, nfe, seed, dtype, sampler setting, ...)."""


class DeviceError(TwinFlowError):
    """The asked-for hardware or backend is absent on this machine."""


class OutOfMemoryError(DeviceError):
    """The device, or the host, has too little free memory. What was begun is undone and its memory given
    back: whatever raised this can be called again."""


class StorageError(TwinFlowError, OSError):
    """An output could not be written: no space, no permission. Nothing of it is left."""


class CancelledError(TwinFlowError):
    """The caller's `cancel` callback asked a running generation to stop."""
