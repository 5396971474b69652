"""The exception tree: every failure a caller can cause or meet is a `TwinFlowError`.

Each message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import re
from importlib.util import find_spec


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


class NonFiniteError(TwinFlowError, ArithmeticError):
    """Images hold NaN or infinity and would be black: damaged weights, or numbers beyond what the dtype holds."""


class StorageError(TwinFlowError, OSError):
    """An output could not be written: no space, no permission. Nothing of it is left."""


class PromptTruncatedWarning(UserWarning):
    """A prompt is longer than a model reads. lost: the text that it does not see."""

    def __init__(self, message: str, lost: str = "") -> None:
        super().__init__(message)
        self.lost = lost


class CancelledError(TwinFlowError):
    """The caller's `cancel` callback asked a running generation to stop."""


def require_extra(what: str, extra: str, *modules: str) -> None:
    """Raise `extra_missing` unless all of `modules` are installed; to be called before anything long begins.

    what: the feature that needs them, e.g. "plots".
    """
    if absent := [name for name in modules if find_spec(name) is None]:
        raise extra_missing(f"{what} needs {' and '.join(absent)}", extra)


def extra_missing(what: str, extra: str) -> ConfigError:
    """Return the error for packages that are absent, and how an optional part of the project is installed.

    what: which feature needs what, e.g. "plots need matplotlib". extra: the part, as pyproject.toml names it. The
    project is on no package index, so its extras are installed from a checkout, or their packages by name.
    """
    from importlib.metadata import PackageNotFoundError, requires

    try:
        listed = [r.partition(";") for r in requires("twinflow-rt") or ()]
    except PackageNotFoundError:  # run from a checkout that is not installed
        listed = []
    names = [f"'{name.strip()}'" for name, _, marker in listed if re.search(rf"extra *== *['\"]{extra}['\"]", marker)]
    by_name = f", or anywhere: pip install {' '.join(names)}" if names else ""
    return ConfigError(f"{what}: pip install '.[{extra}]' in a checkout of twinflow_rt{by_name}")
