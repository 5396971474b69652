"""JSON against the types that dataclasses declare: what a file says is checked before it is believed."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict


def typed(value: Any, hint: Any, where: str) -> Any:
    """Return `value`, as JSON has it, as a `hint`.

    hint: int, float (finite, or an int), bool, str, None, Literal, unions of these, Annotated[X, least] for numbers
    that are not below `least`, list[X], tuple[X, ...] and tuple[X, Y] from lists, dict[str, X], and dataclasses and
    TypedDicts of them from objects with exactly their fields. Raises ValueError saying where it is something else.
    """
    kind, args = get_origin(hint), get_args(hint)
    if kind is Annotated:
        if typed(value, args[0], where) < args[1]:
            raise _error(value, f"{args[1]} or more", where)
        return value
    if kind in (Union, UnionType):
        return _one_of(value, args, where)
    if kind is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        raise _error(value, f"one of {', '.join(map(repr, args))}", where)
    if kind is tuple:
        return _tuple(value, args, where)
    if kind is list:
        return [*_tuple(value, (args[0], ...), where)]
    if kind is dict:
        if not isinstance(value, dict):
            raise _error(value, "an object", where)
        return {key: typed(item, args[1], f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(hint):
        make: Any = hint
        return make(**_fields(value, hints_of(make), frozenset(), where))
    if is_typeddict(hint):
        return _fields(value, hints_of(hint), hint.__optional_keys__, where)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise _error(value, "a finite number", where)
        return value
    if hint not in (int, bool, str, NoneType) or type(value) is not hint:
        raise _error(value, {NoneType: "null", int: "an integer", float: "a number"}.get(hint, hint.__name__), where)
    return value


def _one_of(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    errors = []
    for hint in hints:
        try:
            return typed(value, hint, where)
        except ValueError as error:
            errors.append(error)
    raise errors[0]  # of what a value usually is, which stands first


def _tuple(value: Any, hints: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _error(value, "a list", where)
    if hints[1:] == (...,):
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        raise _error(value, f"a list of {len(hints)}", where)
    return tuple(typed(item, hint, f"{where}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True)))


def _fields(value: Any, hints: dict[str, Any], optional: frozenset[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _error(value, "an object", where)
    if absent := sorted({*hints} - optional - {*value}):
        raise ValueError(f"{where} lacks {', '.join(absent)[:200]}")
    if strange := sorted({*value} - {*hints}):
        raise ValueError(f"{where} has fields that are not known: {', '.join(strange)[:200]}")
    return {name: typed(value[name], hint, f"{where}.{name}") for name, hint in hints.items() if name in value}


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields, or of a TypedDict's keys."""
    hints = get_type_hints(cls, include_extras=True)
    names = [*hints] if is_typeddict(cls) else [f.name for f in fields(cls)]
    return {n: get_args(hints[n])[0] if get_origin(hints[n]) is NotRequired else hints[n] for n in names}


def _error(value: Any, wanted: str, where: str) -> ValueError:
    return ValueError(f"{where} must be {wanted}, not {value!r:.60}")
