"""Record the work of a stage once per shape and replay it: CUDA graphs on a GPU, CPU graphs on a CPU (`cpu_graph`).

A stage of a one-step model is a fixed list of kernels, so it is recorded once for every shape it meets (a
bucket: exact size and batch, prompt length up to its `models.context.bucket`) and then costs one launch. Inputs are
copied into the buffers that were recorded with, outputs out of theirs, so callers keep what they get.

    graphs = Captures(CudaGraphs(device))
    y = graphs("decode", network, network.forward, x)      # records for x's shape, or replays

`owner` is what the recorded addresses belong to: where it is another object than last time (a network that
was compiled anew), the stage's graphs are forgotten. `version` tells apart what one owner computes with in turn (the
constants of schedules). One lock holds copy-in, replay and
copy-out together, and each replay waits on the device for the one before: any thread and stream may call.

Memory. All graphs share one pool, so their intermediate results lie in the same memory: together they need what the
largest needs. The pool's bytes are counted as it grows; it shrinks only as a whole, so where it and inputs exceed
`budget` all graphs go and what is needed is recorded again. At most `entries` graphs are kept, the least recently
used goes first.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import DeviceError
from .cpu_graph import CpuGraphs
from .cuda_graph import CudaGraphs
from .forks import Lock
from .out_of_memory import is_out_of_memory
from .tensor_tree import map_tensors, structure

ENTRIES = 32  # graphs kept
BUDGET = 8 << 30  # bytes of the pool
SHAPES = 256  # on a CPU: graphs kept, and shapes whose first call is remembered
LONGEST = 0.1  # seconds of a call on a CPU beyond which the Python between its ops is a small part
# Latent positions of a batch (128 x 128: one image of 1024 x 1024 at 8 pixels a latent) up to which "auto"
# records the network. Beyond, kernels are long enough to hide their launches, and masks for padded prompts
# would cost more than that. Judged, not measured.
AUTO_POSITIONS = 128 * 128


class Backend(Protocol):
    """Record and replay on one kind of device. Calls come one at a time, under the lock of `Captures`."""

    def record(self, run: Callable[[], Any], inputs: list[Tensor]) -> tuple[Any, Any, int]:
        """Return a graph of `run`, what run returned (tensors that every replay writes), bytes the pool grew by.
        inputs: what run reads whose values differ from replay to replay."""

    def enter(self) -> None:
        """Have the caller's stream wait for the last replay; called before inputs are copied in."""

    def replay(self, graph: Any) -> None:
        """Run the graph on the caller's stream."""

    def leave(self) -> None:
        """Note that the replay is done with; called after outputs are copied out."""

    def reset(self) -> None:
        """Give the pool back; its graphs are gone."""


@dataclass(frozen=True)
class Stats:
    """What happened to one stage: graphs kept, calls they served, recordings made, graphs given up for room,
    bytes of static inputs; refused: why calls run without a graph, or None."""

    kept: int = 0
    replayed: int = 0
    recorded: int = 0
    evicted: int = 0
    input_bytes: int = 0
    refused: str | None = None

    def __str__(self) -> str:
        text = f"{self.kept} kept, {self.replayed} replays, {self.recorded} recordings, {self.evicted} given up"
        return f"{text}; without: {self.refused}" if self.refused else text


@dataclass
class _Entry:
    graph: Any
    inputs: list[Tensor]
    outputs: Any

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.inputs)


class Captures:
    """Call functions of tensors by recorded graphs; see the module's docstring.

    strict: raise DeviceError where recording fails; else that shape runs without a graph, and `stats` says why.
    kind: what a plan calls them. buckets: whether prompts are padded so that more of them have the same shape: where
    recording costs much. longest: record what took at most so many seconds when it came first, and not before it comes
    again; None: everything, at once.
    """

    def __init__(
        self, backend: Backend, *, entries: int = ENTRIES, budget: int = BUDGET, strict: bool = False,
        kind: str = "graphs", buckets: bool = True, longest: float | None = None,
    ) -> None:  # fmt: skip
        self.backend, self.entries, self.budget, self.strict = backend, entries, budget, strict
        self.kind, self.buckets, self.longest = kind, buckets, longest
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self.pool_bytes = 0
        self._lock = Lock()
        self._kept: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._plain: dict[Hashable, str] = {}
        self._owners: dict[str, Any] = {}
        self._stats: dict[str, Stats] = {}

    def __call__(
        self, stage: str, owner: Any, function: Callable[..., Any], *args: Any, version: object = None
    ) -> Any:
        """Return function(*args), by a graph. args: tensors, also in tuples, dicts and dataclasses; everything else in
        them must be hashable and decides, with shapes and dtypes, which graph it is. The result's tensors are
        the caller's own. function may read other tensors if they live as long as `owner` and never move. version:
        stands for those of them that are others from call to call: graphs of every version are kept."""
        leaves: list[Tensor] = []
        key = (stage, version, structure(args, leaves), torch.is_inference_mode_enabled())
        with self._lock:
            if self._owners.get(stage) is not owner:
                self.forget(stage)
                self._owners[stage] = owner
            entry = self._kept.get(key)
            if entry is None and self.longest is not None and key not in self._met:
                return self._first(key, function, args)
            if key in self._plain or (entry is None and (entry := self._record(key, function, args, leaves)) is None):
                return function(*args)
            self._kept.move_to_end(key)
            self._count(stage, replayed=1)
            self.backend.enter()
            for static, given in zip(entry.inputs, leaves, strict=True):
                static.copy_(given)
            self.backend.replay(entry.graph)
            result = map_tensors(entry.outputs, lambda x: x.clone())
            self.backend.leave()
            return result

    def _first(self, key: Any, function: Callable[..., Any], args: Any) -> Any:
        """Return a call's result whose shape may never come again, so it is not recorded."""
        begin = time.perf_counter()
        result = function(*args)
        if self.longest is not None and (taken := time.perf_counter() - begin) > self.longest:
            self._refuse(key, f"takes {taken:.2f} s: what recording saves would not show")
        self._met[key] = None
        while len(self._met) > SHAPES:
            self._plain.pop(self._met.popitem(last=False)[0], None)
        return result

    def refuse(self, stage: str, why: str) -> None:
        """Note why calls of a stage do not come here."""
        with self._lock:
            self._refuse((stage, None), why)

    @property
    def nbytes(self) -> int:
        """Return the bytes that graphs hold: their pool and their inputs."""
        return self.pool_bytes + sum(entry.nbytes for entry in self._kept.values())

    def stats(self) -> dict[str, Stats]:
        """Return what has happened so far, per stage."""
        out = {}
        for stage, stats in self._stats.items():
            entries = [entry for key, entry in self._kept.items() if key[0] == stage]  # type: ignore[index]
            refused = next((why for key, why in self._plain.items() if key[0] == stage), None)  # type: ignore[index]
            out[stage] = replace(stats, kept=len(entries), input_bytes=sum(e.nbytes for e in entries), refused=refused)
        return out

    def notes(self) -> tuple[str, ...]:
        """Return lines for a plan."""
        if not self._stats:
            return (f"{self.kind}: none recorded yet",)
        held = f"{self.kind} hold {self.nbytes / 1e6:,.1f} MB of at most {self.budget / 1e6:,.1f} MB"
        return (held, *(f"{self.kind} of {stage}: {stats}" for stage, stats in self.stats().items()))

    def clear(self) -> None:
        """Give up all graphs and their memory."""
        with self._lock:
            self._clear()

    def forget(self, stage: str) -> None:
        """Drop the graphs of one stage; for `__call__`."""
        for held in (self._kept, self._plain, self._met):
            for key in [key for key in held if key[0] == stage]:  # type: ignore[index]
                del held[key]
        if not self._kept and self.pool_bytes:
            self._clear()

    def _clear(self) -> None:
        for key in self._kept:
            self._count(key[0], evicted=1)  # type: ignore[index]
        self._kept.clear()
        self.pool_bytes = 0
        self.backend.reset()

    def _record(self, key: Any, function: Callable[..., Any], args: Any, leaves: list[Tensor]) -> _Entry | None:
        """Record and keep a graph; return None where this call and those like it run without one."""
        stage = key[0]
        while len(self._kept) >= self.entries:
            old, _ = self._kept.popitem(last=False)
            self._count(old[0], evicted=1)  # type: ignore[index]
        for alone in (False, True):
            static = [x.clone() for x in leaves]
            supply = iter(static)
            inputs = map_tensors(args, partial(_taken, supply))
            try:
                graph, outputs, grown = self.backend.record(partial(function, *inputs), static)
            except RuntimeError as error:
                if self.longest is not None and is_out_of_memory(error):
                    raise  # a CPU graph takes what the call takes, which would fail as well
                reason = f"recording failed ({str(error).splitlines()[0]})"
                if self.strict:
                    raise DeviceError(f"stage {stage}: {reason}; capture='off' runs without graphs") from error
                self._refuse(key, reason)
                return None
            self._count(stage, recorded=1)
            self.pool_bytes += grown
            entry = _Entry(graph, static, outputs)
            if self.nbytes + entry.nbytes <= self.budget:
                self._kept[key] = entry
                return entry
            del graph, outputs, entry
            if alone or self.pool_bytes == grown:
                break
            self._clear()  # then once more, in a pool of its own
        needed = self.pool_bytes
        self._clear()
        self._refuse(key, f"its graph alone needs {needed / 1e6:,.1f} MB, beyond the budget")
        return None

    def _refuse(self, key: tuple[str, Hashable], reason: str) -> None:
        self._plain[key] = reason
        self._count(key[0])

    def _count(self, stage: str, **more: int) -> None:
        stats = self._stats.get(stage, Stats())
        self._stats[stage] = replace(stats, **{name: getattr(stats, name) + n for name, n in more.items()})


def _taken(supply: Iterator[Tensor], _: Tensor) -> Tensor:
    return next(supply)


def open_captures(mode: str, device: torch.device) -> Captures | None:
    """Return the captures that `load(capture=mode)` asks for, or None. "auto" has CUDA graphs on a GPU, CPU
    graphs on a CPU.

    Raises DeviceError for "graphs" where there are none.
    """
    if mode == "off" or (mode == "auto" and device.type not in ("cuda", "cpu")):
        return None
    if mode == "auto" and device.type == "cpu":
        return Captures(CpuGraphs(), entries=SHAPES, kind="CPU graphs", buckets=False, longest=LONGEST)
    if device.type != "cuda":
        raise DeviceError(f"capture='graphs' records CUDA graphs, and this model is on {device}; use 'auto' or 'off'")
    return Captures(CudaGraphs(device), strict=mode == "graphs")
