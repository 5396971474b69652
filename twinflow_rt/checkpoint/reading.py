"""Weights on their way from a checkpoint into a network: one tensor at a time, and one loop for everyone who reads.

A network is declared on the meta device, compared with its files (`layout.check`), and then filled:

    reader = Reader(network.state_dict(), checkpoint, layout, device, dtype)
    read_into(sink, reader.tensors(names), checkpoint.meter)

What becomes of a tensor is the sink's matter: it is assigned, quantized, or kept for blocks that stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.int4 import Int4Form, Int4Weight
from .checkpoint import Checkpoint
from .fuse import sources, stack
from .layout import Layout, check
from .load_report import LoadReport, Meter

OWN_BLOCKS, MADE = "the file's own", "made here"  # where the bits of a quantized weight are from, in words
Progress = Callable[[int], None]  # called with the bytes just read
Sink = Callable[[str, Any], None]  # takes one tensor (or an Int4Weight), under the name the network has for it


@dataclass(frozen=True)
class Reader:
    """Reads the tensors of one network, under the names the network has for them, as it holds them.

    expected: the network's tensors, of which the shapes count (meta is enough). dtype: what the network computes in;
    the layout may hold some tensors in another.
    """

    expected: Mapping[str, Tensor]
    checkpoint: Checkpoint
    layout: Layout
    device: torch.device
    dtype: torch.dtype

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return one tensor on the device, stacked from its parts where the layout merges them.

        dtype: in place of the network's.
        """
        parts, target = sources(name, self.layout.fused), self.layout.dtype_of(name, dtype or self.dtype)
        if len(parts) == 1:
            return self.checkpoint.get(name, self.device, target)
        return stack((self.checkpoint.get(p, self.device, target) for p in parts), len(self.expected[name]))

    def int4_form(self, name: str) -> tuple[Int4Form | None, str]:
        """Return how files have a weight in 4 bits, None where they do not, and where its 4 bits are from, in words."""
        parts = sources(name, self.layout.fused)
        forms = {self.checkpoint.int4_form(part) for part in parts}
        if len(forms) == 1 and None not in forms:
            return forms.pop(), OWN_BLOCKS
        if not any(map(self.checkpoint.in_blocks, parts)):
            return None, MADE
        if any(name in lora for lora in getattr(self.checkpoint, "adapters", ()) for name in parts):
            return None, "made anew: an adapter is merged into them"
        return None, f"made anew of blocks of {'several forms' if len(forms) > 1 else 'another form'}"

    def int4(self, name: str) -> Int4Weight:
        """Return a weight in the files' own 4 bits, where it has such a form, stacked like `tensor`."""
        parts = [self.checkpoint.get_int4(part, self.device) for part in sources(name, self.layout.fused)]
        packed, group_scales, minimums, scales = zip(*parts, strict=True)
        joined = None if minimums[0] is None else torch.cat(minimums)
        return Int4Weight(torch.cat(packed), torch.cat(group_scales), joined, torch.cat(scales))

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) for each of `names`; none is kept here."""
        for name in names:
            yield name, self.tensor(name)


def read_into(
    sink: Sink, tensors: Iterable[tuple[str, Any]], meter: Meter, progress: Progress | None = None
) -> None:
    """Hand every tensor to `sink` and let go of it before the next one is read.

    meter: of the checkpoint that `tensors` are read from. progress: called after each with the bytes read for it.
    """
    before = meter.bytes_read
    for name, tensor in tensors:
        sink(name, tensor)
        del tensor
        if progress is not None:
            progress(meter.bytes_read - before)
        before = meter.bytes_read


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where `module` has the parameter (frozen) or buffer `name`."""
    path, _, leaf = name.rpartition(".")
    parent = module.get_submodule(path)
    setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in parent._parameters else tensor)


def materialize(
    module: nn.Module, checkpoint: Checkpoint, layout: Layout, device: torch.device, dtype: torch.dtype,
    progress: Progress | None = None,
) -> LoadReport:  # fmt: skip
    """Fill `module`, built on the meta device, from `checkpoint`; afterwards it is frozen and in eval mode.

    Returns what that took. Raises CheckpointError where the files are not this network's.
    """
    checkpoint.meter.start()
    expected = module.state_dict()
    check(expected, checkpoint, layout)
    reader = Reader(expected, checkpoint, layout, device, dtype)
    read_into(partial(assign, module), reader.tensors(expected), checkpoint.meter, progress)
    module.eval()
    return checkpoint.meter.report(len(expected), checkpoint.total_bytes())
