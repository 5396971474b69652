"""Networks without memory: built on the meta device, read or counted later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Float32(TorchFunctionMode):
    """Make tensors of no stated dtype float32, whatever torch's default is at the moment."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.ones) and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
        return function(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """Build what the block builds on the meta device, in float32 where it names no dtype."""
    with _Float32(), torch.device("meta"):
        yield
