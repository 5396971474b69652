"""torch's module containers, for a type checker told apart by what they hold; at run time torch's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
