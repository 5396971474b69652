"""torch's module containers, for a type checker told apart by what they hold; at run time torch's own. And modules
that find theirs fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, ValuesView
    from typing import Generic, TypeVar, overload

    M = TypeVar("M")

    class ModuleList(nn.ModuleList, Generic[M]):
        def __init__(self, modules: Iterable[M] = ()) -> None: ...
        def __iter__(self) -> Iterator[M]: ...  # type: ignore[override]
        @overload  # type: ignore[override]
        def __getitem__(self, index: int) -> M: ...
        @overload
        def __getitem__(self, index: slice) -> ModuleList[M]: ...
        def __getitem__(self, index: int | slice) -> M | ModuleList[M]: ...

    class ModuleDict(nn.ModuleDict, Generic[M]):
        def __init__(self, modules: Mapping[str, M] | None = None) -> None: ...
        def __getitem__(self, key: str) -> M: ...  # type: ignore[override]
        def values(self) -> ValuesView[M]: ...  # type: ignore[override]

else:
    ModuleDict, ModuleList = nn.ModuleDict, nn.ModuleList


class Module(nn.Module):
    """A module whose own modules are plain attributes, too. nn.Module looks for one only where Python has found
    nothing, which takes as long as a view of a tensor, and a layer of a small network has a dozen to find."""

    def __setattr__(self, name: str, value: Any) -> None:
        self._forget(name)
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        self._forget(name)
        super().__delattr__(name)

    def _forget(self, name: str) -> None:
        if isinstance(self.__dict__.get(name), nn.Module):
            del self.__dict__[name]
