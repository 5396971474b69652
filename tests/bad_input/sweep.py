"""Values of every kind, and the call of a function with each of them in the place of each parameter."""

from __future__ import annotations

import datetime
import decimal
import fractions
import inspect
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from twinflow_rt.errors import TwinFlowError


class Hostile:
    """Everything that Python may ask of it fails."""

    __hash__ = None

    def fail(self, *_):
        raise OSError("no")

    __repr__ = __str__ = __eq__ = __len__ = __iter__ = __index__ = __float__ = __bool__ = __fspath__ = fail


def odd_values():
    """Values, made anew each time as some are used up."""
    return [
        True, False, None, "", " ", "a", "x" * 100_000, "\0", "\ud800", "1", "nan", b"", b"bytes", bytearray(b"x"),
        0, 1, -1, 3, 2**31, 2**63, 2**64, 10**5000, -(10**5000), 0.0, 1.0, 0.5, -0.5, 1e300, -1e300, float("nan"),
        float("inf"), 1j, [], [[]], [[1]], [None], [""], ["a"], ["\ud800"], [1], [-1], [1, 2, 3], [10**5000], (), (1,),
        (None, None, 1), (None, None, None), ("a", 1.0), {}, {"a": 1}, {1: None}, {"a": float("nan")}, {"a"},
        frozenset(), range(0), range(1), range(3), object(), object, Hostile(), [Hostile()], {"a": Hostile()},
        lambda: None, lambda a: None, lambda a, b, c, d: None, (x for x in "a"), iter(["a"]), map(str, [1]),
        np.int64(1), np.int8(-1), np.uint64(2**63), np.float32(1), np.float64("nan"), np.bool_(True), np.str_("a"),
        np.array(1), np.array([1]), np.array([1, 2]), np.array([]), np.array(["a"]), np.array([None]),
        np.zeros((2, 2)), torch.tensor(1), torch.tensor([1]), torch.tensor(True), torch.ones(2), torch.ones(2, 2),
        torch.empty((), dtype=torch.int64, device="meta"), torch.empty(3, device="meta"), torch.float32, torch.int8,
        torch.device("cpu"), torch.device("meta"), torch.Generator(), torch.nn.Parameter(torch.ones(1)), Path("a"),
        Path("x" * 5000), NotImplemented, Ellipsis, Exception("x"), slice(1), memoryview(b"a"), decimal.Decimal(1),
        fractions.Fraction(1), datetime.timedelta(1), threading.Lock(), np,
    ]  # fmt: skip


def sweep(call, of=None, **good):
    """Call with each odd value in the place of each parameter, or of those named in `of`; the others are those in
    `good`, or have defaults."""
    taken = Counter()
    names = of or tuple(inspect.signature(call).parameters)
    for name in names:
        for value in odd_values():
            given = {**good, name: value}
            try:
                call(**given)
                taken[name] += 1
            except TwinFlowError as error:
                text = str(error)
                assert "\n" not in text and len(text) < 1000, (name, type(value), text)
            except Exception as error:
                raise AssertionError(f"{name}={type(value)}: a raw {type(error).__name__}: {error}") from error
    assert all(taken[name] < len(odd_values()) / 4 for name in names), taken  # nothing takes whatever it is given
