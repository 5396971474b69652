"""The least time a stage can take on a machine of known ceilings: max(FLOPs / peak rate, bytes / bandwidth).

FLOPs and bytes are counted by running the stage on the meta device (`work`); ceilings are declared in `CEILINGS`, or
measured ones are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ceiling:
    """Peak dense rate in FLOP/s of matrix products in a model's dtype, memory bandwidth in bytes/s, and the rate of
    products of 8 bits, None where it is not known."""

    flops: float
    bandwidth: float
    eight_bit: float | None = None


# Declared, not measured here: large bf16 GEMM and copy rates reported for these cards; for the CPU,
# float32 and int8 GEMM on two cores with AVX2.
CEILINGS = {
    "h200": Ceiling(0.72e15, 4.0e12),
    "h100": Ceiling(0.65e15, 2.8e12),
    "a100": Ceiling(0.25e15, 1.7e12),
    "cpu-2-cores": Ceiling(0.136e12, 2.0e10, 0.3e12),
}


@dataclass(frozen=True)
class StageWork:
    """What one stage costs for one image.

    flops: of matrix products, convolutions and attention, multiply and add counted apart. weight_bytes: of the weights
    it reads, each once; token embeddings, of which it reads a few rows, do not count. activation_bytes: what those
    products read and write besides, everything between them fused into them. eight_bit_flops: those of layers that have
    8-bit weights.
    """

    name: str
    flops: int
    weight_bytes: int
    activation_bytes: int = 0
    eight_bit_flops: int = 0

    def seconds(self, ceiling: Ceiling) -> float | None:
        """Return the least time the roofline allows, None where it has products of 8 bits, whose rate is not known."""
        seconds = 0.0
        if self.eight_bit_flops:
            if ceiling.eight_bit is None:
                return None
            seconds = self.eight_bit_flops / ceiling.eight_bit
        compute = (self.flops - self.eight_bit_flops) / ceiling.flops + seconds
        return max(compute, (self.weight_bytes + self.activation_bytes) / ceiling.bandwidth)

    def floors(self, ceilings: Mapping[str, Ceiling]) -> dict[str, float | None]:
        """Return `seconds` for each of several machines."""
        return {name: self.seconds(ceiling) for name, ceiling in ceilings.items()}


def duration(seconds: float | None) -> str:
    """Return a least time as text."""
    if seconds is None:
        return "unknown"
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
