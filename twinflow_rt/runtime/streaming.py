"""Weights that come block by block and go again: a network runs in the memory of one or two of its blocks.

A one-step model reads every weight once per image, so what streaming costs is the reading: from the mapped
files on a CPU (the system keeps as much of them as it has room for), over the bus from pinned memory on a GPU,
where the next block is copied by a stream of its own while one computes, into two buffers in turn.

What streams are the linear layers and convolutions of a network's repeated blocks. Tables, norms, embedders and
whatever runs once per prompt stay; so do the first blocks, where only some need to go. A text encoder's token
embeddings stay on the host, where a prompt's rows are picked out. Layers of 8 bits are
quantized while loading for a GPU, so that only their 8 bits and scales cross the bus; for a CPU each time they come,
since what lies in the files has more, or is laid out otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checkpoint.layout import check
from ..checkpoint.load_report import LoadReport
from ..checkpoint.reading import OWN_BLOCKS, Progress, Reader, assign, read_into
from ..ops.int4 import Int4Weight
from ..passes import quantize
from ..passes.blocks import block_names, parameters_of, token_tables

ALIGNMENT = 256  # bytes, of a tensor in a buffer
NOT_RECORDED = "its blocks stream: copying them takes the time, behind which launches are hidden"


class Store(Protocol):
    """A source of blocks. Blocks have numbers, in the order they run."""

    def bring(self, block: int) -> dict[str, Tensor]:
        """Return the parameters of a block on the device, good until `done`."""

    def done(self, block: int) -> None:
        """Note that work with them has been queued on the caller's stream: nothing queued later reads them."""


class Files:
    """Blocks read when they are needed, and dropped: for a CPU, where reading is mapping a file."""

    def __init__(self, names: Sequence[Sequence[str]], read: Callable[[str], dict[str, Tensor]]) -> None:
        self.names, self.read = names, read

    def bring(self, block: int) -> dict[str, Tensor]:
        return {name: tensor for stored in self.names[block] for name, tensor in self.read(stored).items()}

    def done(self, block: int) -> None:
        pass


class Lane(Protocol):
    """A stream of copies into two buffers, and who may touch which when."""

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        """Queue a copy that waits until `slot` was freed, and mark it filled."""

    def filled(self, slot: int) -> None:
        """Have the caller's stream wait until the last copy into `slot` is there."""

    def free(self, slot: int) -> None:
        """Mark that what the caller's stream has queued so far is the last to read `slot`."""


class CudaLane:
    """Copies on a side stream of `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._side = device, torch.cuda.Stream(device)
        self._filled, self._freed = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._freed[slot])
            target.copy_(source, non_blocking=True)
            self._filled[slot].record(self._side)

    def filled(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._filled[slot])

    def free(self, slot: int) -> None:
        self._freed[slot].record(torch.cuda.current_stream(self.device))


class Buffers:
    """Blocks kept on the host, each in one piece of (pinned) memory, copied into two buffers on `device` in turn."""

    def __init__(self, device: torch.device, lane: Lane, *, pinned: bool) -> None:
        self.device, self.lane, self.pinned = device, lane, pinned
        self._host: list[Tensor] = []
        self._places: list[dict[str, tuple[int, torch.dtype, torch.Size]]] = []
        self._slots: list[Tensor] = []
        self._held: list[int | None] = [None, None]
        self._current = 1

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take the next block."""
        places, end = {}, 0
        for name, tensor in tensors.items():
            places[name] = (end, tensor.dtype, tensor.shape)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        host = torch.empty(end, dtype=torch.uint8, pin_memory=self.pinned)
        self._host.append(host)
        self._places.append(places)
        for name, view in self._views(len(self._host) - 1, host).items():
            view.copy_(tensors[name])

    def ready(self) -> None:
        """Make the buffers, when all blocks are there."""
        size = max(len(host) for host in self._host)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]

    def bring(self, block: int) -> dict[str, Tensor]:
        slot = 1 - self._current  # the other one may still be read
        if self._held[slot] != block:  # the first ever, or the last run was given up half-way
            self._load(slot, block)
        self._current = slot
        self.lane.filled(slot)
        return self._views(block, self._slots[slot])

    def done(self, block: int) -> None:
        self.lane.free(self._current)
        if len(self._host) > 1:
            # the slot that was free while this block ran has been filled by the block before's `done`
            self._prefetch((block + 1) % len(self._host))

    def _prefetch(self, block: int) -> None:
        slot = 1 - self._current
        if self._held[slot] != block:
            self._load(slot, block)

    def _load(self, slot: int, block: int) -> None:
        host = self._host[block]
        self.lane.copy(slot, self._slots[slot][: len(host)], host)
        self._held[slot] = block

    def _views(self, block: int, memory: Tensor) -> dict[str, Tensor]:
        out = {}
        for name, (start, dtype, shape) in self._places[block].items():
            size = dtype.itemsize * shape.numel()
            out[name] = memory[start : start + size].view(dtype).view(shape)
        return out


class Stream:
    """Bring the parameters of `blocks` (names) before each runs and take them away after it.

    Hooks on the blocks do it; a block that raises loses its parameters all the same.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[str], store: Store) -> None:
        self.network, self.store = network, store
        self._blank = [{n: network.get_parameter(n) for n in parameters_of(network, block)} for block in blocks]
        for i, name in enumerate(blocks):
            block = network.get_submodule(name)
            block.register_forward_pre_hook(self._before(i))
            block.register_forward_hook(self._after(i), always_call=True)

    def _before(self, i: int) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            for name, tensor in self.store.bring(i).items():
                assign(self.network, name, tensor)

        return hook

    def _after(self, i: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for name, blank in self._blank[i].items():
                assign(self.network, name, blank.data)
            self.store.done(i)

        return hook


class Streaming:
    """Take the weights of a network that is being loaded, of which the last `count` blocks will stream.

    reader: of its tensors. precision, skip_layers: see `passes.quantize.convert_layers`. names: the parameters that
    stream. in_files: those of them that are not to be read while loading, because on a CPU they are read from the
    mapped files as their block runs; on a GPU all are kept on the host.
    """

    def __init__(
        self, network: nn.Module, count: int, reader: Reader, precision: str | None = None,
        skip_layers: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.network, self.device, self.reader = network, reader.device, reader
        self.blocks = block_names(network)[-count:] if count else []
        self._stored = [parameters_of(network, block) for block in self.blocks]
        self.names = frozenset(name for names in self._stored for name in names)
        self._on_host = frozenset(token_tables(network) if self.blocks else ())
        self._waiting: dict[str, Tensor] = {}
        quantize.declare_quantized(network, self.device, precision, skip_layers, reader.int4_form)

    @property
    def mapped(self) -> bool:
        """Whether blocks are read from files as they run."""
        return self.device.type == "cpu"

    @property
    def in_files(self) -> frozenset[str]:
        return self.names if self.mapped else frozenset()

    def read(self, name: str) -> Tensor | Int4Weight:
        """Return one tensor as `take` gets it: a weight of a layer of 4 bits as the files have it, if they do."""
        owner, _, leaf = name.rpartition(".")
        as_stored = leaf == "weight" and getattr(self.network.get_submodule(owner), "origin", "") == OWN_BLOCKS
        return self.reader.int4(name) if as_stored else self.reader.tensor(name)

    def take(self, name: str, tensor: Tensor | Int4Weight) -> None:
        """Keep one tensor on the host if it streams; else put it into the network, quantized if its layer is to be."""
        for part, value in quantize.stored_form(self.network, name, tensor).items():
            if name in self.names:
                self._waiting[part] = value.to("cpu")
            else:
                assign(self.network, part, value.to("cpu") if name in self._on_host else value)

    def start(self) -> None:
        """Have blocks stream from now on, when all parameters have come."""
        if not self.blocks:
            return
        if self.mapped:
            read = lambda name: quantize.stored_form(self.network, name, self.read(name))
            Stream(self.network, self.blocks, Files(self._stored, read))
            return
        buffers = Buffers(self.device, CudaLane(self.device), pinned=True)
        for block in self.blocks:
            buffers.add({name: self._waiting.pop(name) for name in parameters_of(self.network, block)})
        buffers.ready()
        Stream(self.network, self.blocks, buffers)


def load_part(
    part: Any, count: int, device: torch.device, dtype: torch.dtype, progress: Progress | None = None,
    precision: str | None = None, skip_layers: Sequence[str] = (),
) -> LoadReport:  # fmt: skip
    """Fill the network of `part`, of which the last `count` blocks stream, from its checkpoint.

    precision, skip_layers: see `passes.quantize.convert_layers`. Returns what that took.
    """
    network, checkpoint = part.network, part.checkpoint
    checkpoint.meter.start()
    expected = network.state_dict()
    check(expected, checkpoint, part.layout)
    reader = Reader(expected, checkpoint, part.layout, device, dtype)
    streaming = Streaming(network, count, reader, precision, skip_layers)
    tensors = ((name, streaming.read(name)) for name in expected if name not in streaming.in_files)
    read_into(streaming.take, tensors, checkpoint.meter, progress)
    network.eval()
    streaming.start()
    report: LoadReport = checkpoint.meter.report(len(expected), checkpoint.total_bytes())
    return report
