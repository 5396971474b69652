"""What may be read: plain files of a sane size inside their folder; anything else is refused by name.

A model folder comes from someone else. So before any of it is read, every entry must be a plain file or folder (a pipe
would never end), and no link may lead out of the folder, except to the blobs of the Hugging Face cache that the folder
is a snapshot in. JSON and safetensors headers have a bounded size and no key twice.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, OutOfMemoryError

MAX_TEXT = 64 << 20  # bytes; the largest in use, tokenizers of 260,000 tokens, have 34 MB
MAX_HEADER = 25 << 20  # bytes; 20-billion-parameter networks need 0.3 MB
MAX_ENTRIES = 100_000  # files and folders of a model folder
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # can run code when read
GGUF = ".gguf"
WEIGHTS = (".safetensors", GGUF)  # how files of weights end
SHOWN = 8  # names listed in one message
# how files begin that are found in place of the expected one
FOREIGN = {
    b"GGUF": "a GGUF file; these are read as a network's weights, under a name that ends in .gguf",
    b"version https://git-lfs": "a Git LFS pointer in place of the file; download that with `git lfs pull`",
    b"PK\3\4": "a pickle of torch.save, which can run code when read; convert it with safetensors.torch.save_file",
    b"<!doctype html": "a web page in place of the file; download the file itself",
    b"<html": "a web page in place of the file; download the file itself",
}  # fmt: skip


class Declared(NamedTuple):
    """Shape and stored dtype of a tensor that need not exist yet."""

    shape: tuple[int, ...]
    code: str

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return self.code


def some(names: Iterable[str]) -> str:
    """Return the first few names as text, and how many more there are."""
    ordered = [f"{name:.200}" for name in sorted(names)]
    rest = len(ordered) - SHOWN
    return ", ".join(ordered[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def file_type(path: Path) -> int:
    """Return `stat.S_IFMT` of what is at `path`, links followed; 0 where nothing is.

    Raises CheckpointError for a path that cannot be looked at.
    """
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:  # no permission, too long, a loop of links, a NUL
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{str(path)!r:.300} cannot be read ({reason}); give a path that can") from None


def is_folder(path: Path) -> bool:
    return file_type(path) == stat.S_IFDIR


def require_file(path: Path, hint: str = "download it again") -> None:
    """Raise CheckpointError unless `path` is a plain file. hint: what to do where it is missing."""
    kind = file_type(path)
    if not kind:
        raise CheckpointError(f"{path} is missing; {hint}")
    if kind != stat.S_IFREG:
        what = "a folder" if kind == stat.S_IFDIR else "a pipe, socket or device"
        raise CheckpointError(f"{path} is {what}, where a file is expected; put the file in its place")


def refuse_foreign(path: Path, but: bytes | None = None) -> None:
    """Raise CheckpointError for a file that begins as one of another kind (`FOREIGN`). but: the kind it should be."""
    try:
        with path.open("rb") as file:
            start = file.read(32).lstrip()
    except OSError:  # whoever reads the file says so
        return
    for beginning, what in FOREIGN.items():
        if beginning != but and (start.startswith(beginning) or start.lower().startswith(beginning)):
            raise CheckpointError(f"{path} is {what}")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises CheckpointError where it is missing, too large or unreadable."""
    require_file(path, "a model folder has the layout diffusers saves")
    refuse_foreign(path)
    try:
        if (size := path.stat().st_size) > MAX_TEXT:
            raise CheckpointError(f"{path} has {size:,} bytes; none has more than {MAX_TEXT:,}: download it again")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); change its permissions") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error}); download it again") from None


def read_json(path: Path, infinite: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file. infinite: whether it may hold infinity and NaN, as Python writes them. Raises
    CheckpointError saying what is wrong with it."""
    try:
        content = parse_json(read_text(path), infinite)
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}; download it again")
    return content


def parse_json(text: str | bytes, infinite: bool = False) -> Any:
    """Return what `text` says. Raises ValueError for a key that stands twice, NaN (unless `infinite`), or endless
    nesting, too."""
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=float if infinite else _no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r:.80} stands twice")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def open_tensors(path: Path) -> Any:
    """Open a safetensors file, mapped (`safe_open`); only its header is read. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    require_file(path)
    refuse_foreign(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{str(path)!r:.300}: safetensors opens only names that are UTF-8; rename it") from None
    try:
        _check_header(path)
        return safe_open(path, framework="pt", device="cpu")
    except MemoryError as error:
        raise OutOfMemoryError(f"{path} cannot be mapped ({error}); free some memory, or raise `ulimit -v`") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}); download it again") from None


def _check_header(path: Path) -> None:
    """Raise ValueError for a header that is too long or names a tensor twice.

    The library, which would take the last of two, checks the rest: dtypes, shapes, and that offsets neither overlap
    nor leave the file.
    """
    with path.open("rb") as file:
        size, length = path.stat().st_size - 8, int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"it claims a header of {length:,} bytes, more than the {MAX_HEADER:,} taken")
        if length > size:
            raise ValueError(f"it claims a header of {length:,} bytes but has {max(size, 0):,}")
        parse_json(file.read(length))


def check_tree(root: Path) -> None:
    """Raise CheckpointError for whatever in folder `root` is no plain file or folder, or a link that leads out of it.

    See the module's docstring. Hidden entries are never read and not looked at.
    """
    home = root.resolve()
    allowed = (home, *(p.parent / "blobs" for p in home.parents if p.name == "snapshots"))
    folders, count = [root], 0
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read ({error.strerror}); change its permissions") from None
        count += len(entries)
        if count > MAX_ENTRIES:
            raise CheckpointError(f"{root} holds more than {MAX_ENTRIES:,} files; it is no model folder: give one")
        for entry in entries:
            if not entry.name.startswith("."):
                folders += _visit(Path(entry.path), entry.is_symlink(), allowed)


def _visit(path: Path, link: bool, allowed: tuple[Path, ...]) -> list[Path]:
    """Check one entry; return it if it is a folder to be looked into."""
    kind = file_type(path)
    if link:
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{path} is a link to {target}, outside the model folder; put the file itself in its place, "
                "or load the folder that it leads to"
            )
    if not kind:
        raise CheckpointError(f"{path} is a link to nothing; the download is incomplete")
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise CheckpointError(f"{path} is a pipe, socket or device, which no model folder has; remove it")
    return [path] if kind == stat.S_IFDIR and not link else []
