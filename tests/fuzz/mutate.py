"""Small damages to bytes, a pure function of the seed: half blind, half of the JSON in them."""

from __future__ import annotations

import json
import random
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**40, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e-320,
    1e308, "", "a", "\0", "\ud800", "../x", "/etc/passwd", "x" * 5000, "F32", "I64", [], [0], [[]], [1, 2, 3], ["a"],
    {}, {"a": 1}, [2**63, 2**63], [0] * 1000, {"": None},
)  # fmt: skip
BYTES = (
    b"", b"\0", b"\xff", b"[", b"]", b"{", b"}", b'"', b"\\", b":", b"-", b"9" * 30, b"NaN", b"1e999", b"\n",
    b"[" * 5000,
)  # fmt: skip


def mutated(data: bytes, seed: int) -> bytes:
    """`data` with one to three damages."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        data = _structure(data, rng) if rng.random() < 0.5 else _bytes(data, rng)
    return data


def _bytes(data: bytes, rng: random.Random) -> bytes:
    at, kind = rng.randrange(len(data) + 1), rng.randrange(5)
    if kind == 0:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.choice(BYTES) + data[at:]
    end = min(len(data), at + rng.randrange(1, 20))
    return data[:at] + data[end:] if kind == 3 else data[:end] + data[at:end] + data[end:]


def _structure(data: bytes, rng: random.Random) -> bytes:
    """One value of the JSON replaced, removed or doubled; safetensors' header length is kept right."""
    head = data[:8] if data[8:9] == b"{" else b""
    start = len(head)
    end = start + int.from_bytes(head, "little") if head else len(data)
    try:
        content = json.loads(data[start:end])
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    places = list(_places(content))
    if not places:
        return json.dumps(rng.choice(NASTY)).encode()
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}{rng.choice(('', '2', '.weight'))}"] = holder[key]
        holder[key] = rng.choice(NASTY)
    elif kind == 2:
        other, name = rng.choice(places)
        holder[key] = other[name] if other is not holder else rng.choice(NASTY)
    else:
        holder[key] = rng.choice(NASTY)
    try:
        text = json.dumps(content).encode()
    except (ValueError, RecursionError):  # a value now holds itself
        return _bytes(data, rng)
    return (len(text).to_bytes(8, "little") if head else b"") + text + data[end:]


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every (list or object, index or key) in it."""
    found: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        found = [(content, key) for key in content]
    elif isinstance(content, list):
        found = [(content, i) for i in range(len(content))]
    return found + [place for holder, key in list(found) for place in _places(holder[key])]
