"""Files state the number of their schema; one of another number is refused with a sentence on what to do."""

from __future__ import annotations

from typing import Any

from ..config import integer


def refusal(what: object, found: Any, reads: int, remedy: str) -> str:
    """Return why `what`, which states schema `found`, is not read by a version that reads `reads`.

    remedy: what to do about an older file; a newer one wants a newer twinflow_rt.
    """
    newer = (integer(found) or 0) > reads
    return (
        f"{what} has schema {found!r:.40}{', newer than this version' if newer else ''}, which reads {reads}: "
        + ("upgrade twinflow_rt" if newer else remedy)
    )
