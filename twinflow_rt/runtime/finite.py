"""NaN and infinity, which would be black images: found where tensors are, read when the device has been waited for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALL = 1 << 18  # elements of a tensor up to which looking at it costs less than reading it


def spread(x: Tensor, dims: tuple[int, ...] = ()) -> Tensor:
    """Return max - min over `dims` (none: all) in float32: finite where every element is, and only there."""
    return x.amax(dims).float() - x.amin(dims).float()


def broken(network: nn.Module, most: int | None = None) -> str | None:
    """Return the name of the first tensor of a network that holds NaN or infinity, or None. most: elements of those
    looked at; None: all. 8-bit weights, and what is not in memory, are passed over. Waits for the device once."""
    spreads = {
        name: spread(x if x.layout == torch.strided else x.to_dense())
        for name, x in (*network.named_parameters(), *network.named_buffers())
        if x.dtype in FLOATS and not x.is_meta and 0 < x.numel() <= (most or x.numel())
        if most is None or x.layout == torch.strided  # else packed for oneDNN: unpacking it costs more than reading
    }
    finite = torch.stack([*spreads.values()]).isfinite().tolist() if spreads else []
    return next((name for name, whole in zip(spreads, finite, strict=True) if not whole), None)


class FiniteCheck:
    """What a call has made so far, image by image: `note` waits for nothing, `first` for the device. wanted: without it
    both do nothing."""

    def __init__(self, wanted: bool = True) -> None:
        self.wanted = wanted
        self._noted: dict[str, list[Tensor]] = {}

    def note(self, what: str, images: Tensor) -> None:
        """Note images [B, ...] of a call, named `what` in messages; parts of a batch one after the other."""
        if self.wanted:
            self._noted.setdefault(what, []).append(spread(images, tuple(range(1, images.ndim))))

    def first(self) -> tuple[str, list[int]] | None:
        """Return the first of what was noted that holds NaN or infinity, and in which images, or None."""
        for what, spreads in self._noted.items():
            finite = torch.cat(spreads).isfinite().tolist()
            if not all(finite):
                return what, [i for i, whole in enumerate(finite) if not whole]
        return None
