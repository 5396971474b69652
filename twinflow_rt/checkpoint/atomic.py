"""How outputs are written: under another name beside their own, renamed when complete.

So a file or folder is there whole or not at all, whatever interrupts the writing, and what stood at its name before is
only ever replaced by something complete. Names on the way are unique, so that any number of writers may share a folder;
they say which process writes, so that what a killed one left is removed by the next (`remove_leftovers`). Content is on
the disk before it has its name, so that a power cut leaves the old or the new; of single images it may leave nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StorageError

PREFIX, SUFFIX = ".twinflow-", ".part"
OPEN_FILE = re.compile(r"/dev/std(out|err)|/(dev|proc/self)/fd/\d+")  # written into where it is a plain file, too
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # None: safetensors does not say

_own: set[str] = set()  # names that this process writes to


@contextmanager
def replacing(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a name to write to; what was written there becomes `path` if nothing was raised, else it goes.

        with replacing("out.png") as partial:
            image.save(partial, format="PNG")

    A link is followed: its target is what is replaced, with the permissions it had. A pipe or device (/dev/stdout) is
    written into. durable: wait until the disk has the content. Raises StorageError, for a read-only file too.
    """
    asked, path = Path(path), Path(os.path.realpath(path))
    with _named(asked):
        if is_stream(asked):  # of /dev/stdout the system knows more than its name
            with tempfile.TemporaryDirectory() as folder:
                yield (partial := Path(folder) / "content")
                with partial.open("rb") as content, asked.open("ab", buffering=0) as stream:
                    shutil.copyfileobj(content, stream)
            return
        if _is_read_only(path):
            raise PermissionError(0, "it is read-only")
        _remove_leftovers_once(path.parent)
        partial = _partial(path.parent)
        try:
            yield partial
            if path.exists():
                shutil.copymode(path, partial)
            if durable:
                _sync(partial)
            os.replace(partial, path)
            if durable:
                _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)
            _own.discard(partial.name)


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 file and return its path."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, content: Any, indent: int = 1) -> Path:
    """Write a JSON file and return its path. Raises ValueError for NaN and infinities, which JSON has not."""
    return write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, which is made too; it goes in the end, or with the next writer if this process
    is killed."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    folder = _partial(parent)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _own.discard(folder.name)


@contextmanager
def new_folder(folder: Path, verify: Callable[[Path], object] = lambda partial: None) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `folder` if nothing was raised and `verify` accepts it, else it goes.

    Raises ConfigError where another writer was faster: what it made stays, this one's goes.
    """
    with _named(folder), scratch_folder(folder.parent) as partial:
        yield partial
        verify(partial)
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        try:
            partial.rename(folder)
        except OSError:
            if os.path.lexists(folder):
                raise ConfigError(f"{folder} exists by now: it was written meanwhile; choose another name") from None
            raise
        _sync(folder.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left half-written in `folder`. What another machine, or another
    container, writes to a shared folder is not touched."""
    for path in folder.glob(f"{PREFIX}{_machine()}-*{SUFFIX}"):
        pid = path.name.removeprefix(f"{PREFIX}{_machine()}-").partition("-")[0]
        if pid.isdecimal() and (path.name not in _own if int(pid) == os.getpid() else not _runs(int(pid))):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


# for files, of which a run may write thousands into one folder
_remove_leftovers_once = cache(remove_leftovers)


def _partial(parent: Path) -> Path:
    """Return a name in `parent` that no other writer has. Short: the output's own may be the longest allowed."""
    name = f"{PREFIX}{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
    _own.add(name)
    return parent / name


@cache
def _machine() -> str:
    """Return what tells the processes that this one can see from those of other machines and containers."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _runs(pid: int) -> bool:
    if os.name == "nt":  # there a signal would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's; no process's number
        return True
    return True


def _sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's entries, where the system can say so."""
    if os.name == "nt" or path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_stream(path: Path) -> bool:
    """Return whether a pipe, a device or a socket stands at `path`: to be written into, not replaced."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return OPEN_FILE.fullmatch(str(path)) is not None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_stdout(path: object) -> bool:
    """Return whether `path` is what standard output goes to, a pipe or terminal: nothing else should be said there."""
    try:
        return isinstance(path, Path) and is_stream(path) and os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


def _is_read_only(path: Path) -> bool:
    """Return whether something stands at `path` that may not be written, by anyone (as root may) or by this user."""
    return path.exists() and (not path.stat().st_mode & 0o222 or not os.access(path, os.W_OK))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what the system refuses while `path` is written into a StorageError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if isinstance(error, (StorageError, ConfigError)) or not (isinstance(error, OSError) or _of_safetensors(error)):
            raise
        reason = getattr(error, "strerror", None) or error
        cure = "free some space or choose another place"
        if getattr(error, "errno", None) not in FULL:
            cure = "choose another place"
        raise StorageError(f"{path} could not be written ({reason}); nothing of it is left: {cure}") from error


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
    real = Path(os.path.realpath(path))
    if _is_read_only(real):
        raise ConfigError(f"{what} {path} is read-only; choose another")
    if is_stream(path):
        return
    if make_parents and real.exists() and not real.is_dir():
        raise ConfigError(f"{what} {path} exists and is no folder; choose another name")
    parent = next((p for p in (real, *real.parents) if p.exists()), real.parent) if make_parents else real.parent
    if not parent.is_dir():
        raise ConfigError(f"{what} {path}: folder {parent} does not exist; create it first")
    probe = _partial(parent)
    try:  # permissions do not tell of file systems that nobody, or not even root, writes to
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"{what} {path}: folder {parent} is not writable ({reason}); choose another") from None
    finally:
        _own.discard(probe.name)
