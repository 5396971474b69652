"""How an op is declared: a field of its module's `...Ops`, once, beside the eager reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

Op = Callable[..., Any]  # gives tensors, or `QuantizedRows` where a quantized layer reads them

COMPILED = ("cuda", "triton", "native")  # csrc/cuda, kernels/ and csrc/cpu


def op(eager: Op, *implementations: str) -> Any:
    """A field of an op table: by default the eager reference, which is the op's specification.

    implementations: the names of the others, best first; `implementations` says how each is loaded, where it is
    tried and what speaks against it. The module of `eager` is the stem under which `kernels/` has the op.
    """
    stem = eager.__module__.rpartition(".")[2]
    return field(default=eager, metadata={"implementations": implementations, "stem": stem})
