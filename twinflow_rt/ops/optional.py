"""Optional packages: present, absent or broken, told apart by name.

A package that is not installed is a normal state of a machine. One that is installed and does not
import (built for another torch, a missing shared library) is a defect the user wants to hear about.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata


@dataclass(frozen=True)
class Package:
    """State of one importable module. `problem` says why it cannot be used, None that it can."""

    module: str
    version: str | None
    problem: str | None = None
    broken: bool = False


@cache
def find(module: str, distribution: str | None = None) -> Package:
    """Imports `module` and tells what came of it; `distribution` is its name on PyPI where that differs."""
    version = _version(distribution or module.partition(".")[0])
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if module == missing or module.startswith(missing + "."):
            return Package(module, version, f"{missing} is not installed")
        return Package(module, version, f"{module} is installed but broken: it needs {missing}", broken=True)
    except Exception as error:  # a broken binary raises anything: ImportError, OSError, RuntimeError, AttributeError
        first = (str(error).splitlines() or [""])[0]
        reason = f"{module} is installed but broken: {type(error).__name__}: {first}"
        return Package(module, version, reason, broken=True)
    return Package(module, version)


def absent(module: str, least: tuple[int, ...]) -> str | None:
    """Why `module`, of version `least` or newer, cannot be used, or None."""
    package = find(module)
    if package.problem is None and older(package.version, least):
        return f"{module} {package.version} is older than {'.'.join(map(str, least))}"
    return package.problem


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def older(version: str | None, least: tuple[int, ...]) -> bool:
    """Whether a version such as "3.6.0+git" is below `least`; an unknown one is not."""
    if version is None:
        return False
    numbers = []
    for part in version.partition("+")[0].split(".")[: len(least)]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers) < least
