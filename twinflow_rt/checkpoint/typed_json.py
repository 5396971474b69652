"""JSON against the types that dataclasses declare: what a file says is checked before it is believed."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value`, as JSON has it, as a `hint`: int, float (finite, or an int), bool, str, None, Literal, unions
    of these, tuple[X, ...] and tuple[X, Y] from lists, dict[str, X], and dataclasses of them from objects
    with exactly their fields. Raises ValueError saying where it is something else."""
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return _one_of(value, args, where)
    if kind is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        raise _error(value, f"one of {', '.join(map(repr, args))}", where)
    if kind is tuple:
        return _tuple(value, args, where)
    if kind is dict:
        if not isinstance(value, dict):
            raise _error(value, "an object", where)
        return {key: typed(item, args[1], f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(hint):
        return _object(value, hint, where)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise _error(value, "a finite number", where)
        return value
    if hint not in (int, bool, str, NoneType) or type(value) is not hint:
        raise _error(value, {NoneType: "null", int: "an integer", float: "a number"}.get(hint, hint.__name__), where)
    return value


def _one_of(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    for hint in hints:
        try:
            return typed(value, hint, where)
        except ValueError as error:
            last = error
    raise last


def _tuple(value: Any, hints: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _error(value, "a list", where)
    if hints[1:] == (...,):
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        raise _error(value, f"a list of {len(hints)}", where)
    return tuple(typed(item, hint, f"{where}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True)))


def _object(value: Any, cls: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _error(value, "an object", where)
    names = {f.name for f in fields(cls)}
    if strange := sorted(names ^ set(value)):
        raise ValueError(f"{where} lacks, or has beyond its fields, {', '.join(strange)[:200]}")
    return cls(**{name: typed(value[name], hint, f"{where}.{name}") for name, hint in hints_of(cls).items()})


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _error(value: Any, wanted: str, where: str) -> ValueError:
    return ValueError(f"{where} must be {wanted}, not {value!r:.60}")
