"""CPU graphs: the list of ops that a call on a CPU made, played again without the Python between them.

A small model's call is hundreds of ops of microseconds, and between them Python finds out which comes next (modules,
shapes, choices). For inputs of one shape that is the same list every time, so it is written down once, by a dispatch
mode, and then played: each step calls an op on numbered registers. What the call read besides its inputs (weights,
tables) are constants of the graph. Registers are let go after their last use, as a call's variables are: memory is
allocated as before, and nothing is held between calls but the constants, which live anyway, inputs and results.

`CpuGraphs` stands where a GPU has `cuda_graph.CudaGraphs`.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.native.register import PLAIN
from .tensor_tree import tensors_of

_aten = torch.ops.aten
# the same ops by torch's own bindings, which take half as long to call
BINDINGS: dict[Any, Callable[..., Any]] = {
    _aten.linear.default: F.linear, _aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    _aten.add.Tensor: torch.add, _aten.add_.Tensor: Tensor.add_, _aten.mul.Tensor: torch.mul,
    _aten.cat.default: torch.cat, _aten.transpose.int: torch.transpose, _aten.permute.default: torch.permute,
    _aten.unbind.int: torch.unbind, _aten.unflatten.int: Tensor.unflatten, _aten.flatten.using_ints: torch.flatten,
    _aten.reshape.default: torch.reshape, _aten.view.default: Tensor.view, _aten.expand.default: Tensor.expand,
    _aten.select.int: torch.select,
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Write down every op that is called while entered. inputs: the tensors whose values differ from play to play."""

    keeps_constants = True

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Callable[..., Any], tuple[int, ...], dict[str, Any], int]] = []
        self.registers: list[Any] = []
        self._known: dict[int, tuple[Any, int]] = {}  # of a tensor's id: what tells that it lives on, and its register
        for x in inputs:
            self._remember(x, self._new(x))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, else torch wraps the method below by its compiler, the import of which takes a second and 150
        MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wanted, options = tuple(map(self._register, args)), kwargs or {}
        result = func(*args, **options)
        if any(isinstance(x, Tensor) for x in options.values()):
            raise RuntimeError(f"{func} takes a tensor by name")
        if any(result is x for x in args) and not func._schema.is_mutable:
            return result  # as it was: nothing to play
        place = self._new()
        self.steps.append((PLAIN.get(func) or BINDINGS.get(func, func), wanted, options, place))
        if isinstance(result, Tensor):
            self._remember(result, place)
        elif isinstance(result, (tuple, list)):
            for i, x in enumerate(result):
                part = self._new()
                self.steps.append((operator.getitem, (place, self._new(i)), {}, part))
                self._remember(x, part)
        elif result is not None:
            raise RuntimeError(f"{func} gave a number, which later calls may not have")
        return result

    def register_of(self, x: Tensor) -> int:
        """Return the register of a tensor that a step made, or that was there before: a constant."""
        alive, place = self._known.get(id(x), (lambda: None, -1))
        if alive() is x:
            return place
        place = self._new(x)
        self._remember(x, place)
        return place

    def _register(self, value: Any) -> int:
        if isinstance(value, Tensor):
            return self.register_of(value)
        if isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value):
            place, parts = self._new(), tuple(map(self._register, value))
            self.steps.append((_listed, parts, {}, place))
            return place
        return self._new(value)

    def _new(self, value: Any = None) -> int:
        """Return another register, of a constant or (None) of what a step will make."""
        self.registers.append(value)
        return len(self.registers) - 1

    def _remember(self, x: Tensor, place: int) -> None:
        self._known[id(x)] = weakref.ref(x), place


def _listed(*parts: Any) -> list[Any]:
    return list(parts)


class CpuGraph:
    """The steps that a `Recorder` wrote down: `play()` reads the inputs it was recorded with and writes its results to
    `outputs`."""

    def __init__(self, recorder: Recorder, outputs: list[Tensor]) -> None:
        results = [recorder.register_of(x) for x in outputs]
        self.outputs = list(zip(results, outputs, strict=True))
        self.registers = recorder.registers
        made, last = {place for *_, place in recorder.steps}, dict[int, int]()
        self.made, self.passing = made, made & set(results)
        for number, (_, wanted, _, place) in enumerate(recorder.steps):
            last |= dict.fromkeys((*wanted, place), number)
        dead: dict[int, list[int]] = {}
        for place, number in last.items():
            if place in made and place not in results:
                dead.setdefault(number, []).append(place)
        self.steps = [
            (func, _getter(wanted), options, place, tuple(dead.get(number, ())))
            for number, (func, wanted, options, place) in enumerate(recorder.steps)
        ]

    def play(self) -> None:
        registers = self.registers
        try:
            for func, get, options, place, dead in self.steps:
                registers[place] = func(*get(registers), **options)
                for done in dead:
                    registers[done] = None
            for place, output in self.outputs:
                output.copy_(registers[place])
        except BaseException:  # nothing of a call that fails is kept
            for place in self.made:
                registers[place] = None
            raise
        for place in self.passing:
            registers[place] = None


def _getter(places: tuple[int, ...]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(places) > 1:
        return operator.itemgetter(*places)
    return (lambda registers: (registers[places[0]],)) if places else lambda registers: ()


class CpuGraphs:
    """The `capture.Backend` of a CPU: no pool, nothing to wait for."""

    def record(self, run: Callable[[], Any], inputs: list[Tensor]) -> tuple[CpuGraph, Any, int]:
        with Recorder(inputs) as recorder:
            outputs = run()
        return CpuGraph(recorder, tensors_of(outputs)), outputs, 0

    def enter(self) -> None:
        pass

    def replay(self, graph: CpuGraph) -> None:
        graph.play()

    def leave(self) -> None:
        pass

    def reset(self) -> None:
        pass
