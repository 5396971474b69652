"""How outputs are written: under another name beside their own, renamed when complete.

So a file or folder is there whole or not at all, whatever interrupts the writing, and what stood at
its name before is only ever replaced by something complete.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StorageError

_numbers = itertools.count()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a name to write to; what was written there becomes `path` if nothing was raised, else it goes.

        with replacing("out.png") as partial:
            image.save(partial, format="PNG")
    """
    path = Path(path)
    partial = path.with_name(f".{os.getpid()}-{next(_numbers)}.part")  # short: path's own may be the longest allowed
    try:
        with _named(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 file and return its path."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, content: Any, indent: int = 1) -> Path:
    """Write a JSON file and return its path. Raises ValueError for NaN and infinities, which JSON has not."""
    return write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


@contextmanager
def new_folder(folder: Path, verify: Callable[[Path], object] = lambda partial: None) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `folder` if nothing was raised and `verify` accepts it, else it goes.

    What a killed process left half-written under that name is removed first.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _named(folder):
            partial.mkdir(parents=True)
            yield partial
            verify(partial)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what the system refuses while `path` is written into a StorageError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if isinstance(error, StorageError) or not (isinstance(error, OSError) or _of_safetensors(error)):
            raise
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"{path} could not be written ({reason}); nothing of it is left: free some space or choose another place"
        ) from error


def _of_safetensors(error: Exception) -> bool:
    """Return whether it is safetensors' own exception, which it raises for a full disk, too; nothing is imported."""
    return type(error).__name__ == "SafetensorError"


def check_target(path: Path, what: str, *, make_parents: bool = False) -> None:
    """Raise ConfigError where nothing can be written at `path`: before the slow work, not after it.

    what: the option or argument it came from. make_parents: for a folder, whose parents will be made;
    else a file, which a folder in its place is in the way of.
    """
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a file as a folder, too long, a loop of links, a NUL
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{what} {str(path)!r:.300} cannot be written ({reason}); choose another name") from None
    if not make_parents and path.is_dir():
        raise ConfigError(f"{what} {path}: that is a folder; name a file in it")
    parent = next((p for p in path.absolute().parents if p.exists()), path.parent) if make_parents else path.parent
    if not parent.is_dir():
        raise ConfigError(f"{what} {path}: folder {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{what} {path}: folder {parent} is not writable; choose another")
