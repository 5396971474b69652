"""Files of prompts, as `batch` and `encode` take them.

    .txt      a prompt a line, without the blanks around it; empty lines are skipped (an empty prompt needs a .jsonl)
    .jsonl    a line is an object with `prompt` and what else the row has, or a text alone
    .parquet  the same as columns; needs pyarrow

Text is UTF-8, with or without a byte order mark. A line ends at "\\n" or "\\r\\n" and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.files import parse_json, require_file
from ..errors import ConfigError, extra_missing

FILES = ".txt: a prompt a line, empty lines skipped; .jsonl or .parquet: rows with `prompt`"
NUMBERS = ("seed", "width", "height")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a prompt file: `prompt`, and where the file has them `seed`, `width`, `height`.

    Other columns are left out. Raises ConfigError naming the row or the file, CheckpointError where there is no
    such file.
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise ConfigError(f"{path}: the name of a file of prompts must end in one of {', '.join(READERS)}")
    require_file(path, "name a file of prompts")
    rows = [_row(where, raw) for where, raw in READERS[kind](path)]
    if not rows:
        raise ConfigError(f"{path} holds no prompt; write one a line")
    return rows


def _row(where: str, raw: Any) -> dict[str, Any]:
    row = {"prompt": raw} if isinstance(raw, str) else raw
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigError(f"{where}: no text named 'prompt'")
    given = {name: row[name] for name in ("prompt", *NUMBERS) if row.get(name) is not None}
    for name in NUMBERS:
        if isinstance(given.get(name, 0), bool) or not isinstance(given.get(name, 0), int):
            raise ConfigError(f"{where}: {name} must be an integer, not {given[name]!r}")
    return given


def _read_text(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name a file of prompts") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for where, line in _read_text(path):
        try:
            yield where, parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{where} is not JSON: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise extra_missing(f"{path}: reading parquet needs pyarrow", "ray") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
