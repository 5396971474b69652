"""Tensors inside tuples, lists, dicts and dataclasses: what a recorded call takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def structure(value: Any, leaves: list[Tensor]) -> Hashable:
    """Return all that a recording of `value` depends on but the values of tensors: containers, shapes, strides, dtypes,
    devices, and whatever is no tensor, which must be hashable. The tensors are appended to `leaves`."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(structure(item, leaves) for item in value)
    if isinstance(value, dict):
        return tuple((name, structure(item, leaves)) for name, item in value.items())
    if is_dataclass(value):
        return type(value), tuple(structure(item, leaves) for item in _values(value))
    known: Hashable = value
    return known


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a value, in the order `map_tensors` meets them."""
    leaves: list[Tensor] = []
    structure(value, leaves)
    return leaves


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with each of its tensors replaced by `change(tensor)`, in the order `structure` meets them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {name: map_tensors(item, change) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in fields(value))
        changed = {name: map_tensors(item, change) for name, item in zip(names, _values(value), strict=True)}
        return replace(value, **changed)
    return value


def _values(value: Any) -> Iterator[Any]:
    return (getattr(value, field.name) for field in fields(value))
