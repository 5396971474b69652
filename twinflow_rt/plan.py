"""The plan: what the compile path decided and what it expects, as data and as text.

Predictions are a roofline: a stage takes at least max(FLOPs / peak, bytes / bandwidth) on a device of known
ceilings. FLOPs and bytes are counted by running the stage on the meta device (`predict`); ceilings are declared in
`CEILINGS`, or measured ones are given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from .checkpoint.lora import Lora
from .checkpoint.typed_json import typed
from .checkpoint.versions import refusal
from .config import DTYPES, PRECISIONS
from .errors import CheckpointError
from .ops.selection import Choice
from .passes.layer_groups import Group, Layers, count_text

SCHEMA = 5


@dataclass(frozen=True)
class Ceiling:
    """Peak dense rate in FLOP/s of matrix products in a model's dtype, memory bandwidth in bytes/s, and the rate of
    products of 8 bits, None where it is not known."""

    flops: float
    bandwidth: float
    narrow: float | None = None


# Declared, not measured here: large bf16 GEMM and copy rates reported for these cards; for the CPU,
# float32 and int8 GEMM on two cores with AVX2.
CEILINGS = {
    "h200": Ceiling(0.72e15, 4.0e12),
    "h100": Ceiling(0.65e15, 2.8e12),
    "a100": Ceiling(0.25e15, 1.7e12),
    "cpu-2-cores": Ceiling(0.136e12, 2.0e10, 0.3e12),
}


@dataclass(frozen=True)
class Stage:
    """What one stage costs for one image.

    flops: of matrix products, convolutions and attention, multiply and add counted apart. weight_bytes: of the weights
    it reads, each once; token embeddings, of which it reads a few rows, do not count. activation_bytes: what those
    products read and write besides, everything between them fused into them. narrow_flops: those of layers that have
    8-bit weights.
    """

    name: str
    flops: int
    weight_bytes: int
    activation_bytes: int = 0
    narrow_flops: int = 0

    def seconds(self, ceiling: Ceiling) -> float | None:
        """Least time the roofline allows; None where it has products of 8 bits, whose rate is not known."""
        narrow = 0.0
        if self.narrow_flops:
            if ceiling.narrow is None:
                return None
            narrow = self.narrow_flops / ceiling.narrow
        compute = (self.flops - self.narrow_flops) / ceiling.flops + narrow
        return max(compute, (self.weight_bytes + self.activation_bytes) / ceiling.bandwidth)

    def floors(self, ceilings: Mapping[str, Ceiling]) -> dict[str, float | None]:
        """`seconds` for each of several."""
        return {name: self.seconds(ceiling) for name, ceiling in ceilings.items()}


@dataclass(frozen=True)
class Plan:
    """Everything a compiled program can tell about itself; `str(plan)` prints it.

    folded, pruned: parameters that became constants, and those whose output nothing reads, by kind.
    absorbed: the constants of the one evaluation are inside the weights; else they are tables.
    precision, exempt: "int8", "fp8" or None, and names kept out of it. sensitivity: the errors that were
    measured of quantizing each kind of layer alone, if the choice was made by them. layers: what linear layers
    became. fp8_attention: whether attention's scores are float8 products.
    """

    family: str
    source: str
    device: str
    dtype: str
    schedule: tuple[tuple[float, float], ...]
    choices: tuple[Choice, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    folded: dict[str, int] = field(default_factory=dict)
    pruned: dict[str, int] = field(default_factory=dict)
    absorbed: bool = False
    loras: tuple[Lora, ...] = ()
    precision: str | None = None
    exempt: tuple[str, ...] = ()
    sensitivity: tuple[Group, ...] = ()
    layers: tuple[Layers, ...] = ()
    fp8_attention: bool = False
    stages: tuple[Stage, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `from_dict` reads it back."""
        return {"schema": SCHEMA, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Plan:
        """Raises CheckpointError for another schema, other fields, or a field that is not what it should be."""
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema != SCHEMA:
            raise CheckpointError(refusal("the plan", schema, SCHEMA, "compile again"))
        if strange := set(raw) ^ {"schema", *(f.name for f in fields(cls))}:
            raise CheckpointError(f"the plan lacks or does not know {sorted(strange)!r:.200}: compile again")
        try:
            plan: Plan = typed({k: v for k, v in raw.items() if k != "schema"}, cls, "plan")
        except ValueError as error:
            raise CheckpointError(f"damaged {error}: compile again") from None
        if plan.dtype not in DTYPES or plan.precision not in (None, *PRECISIONS) or not plan.schedule:
            raise CheckpointError(
                f"damaged plan: dtype {plan.dtype!r:.40}, precision {plan.precision!r:.40}, "
                f"{len(plan.schedule)} evaluations: compile again"
            )
        return plan

    def __str__(self) -> str:
        lines = [
            f"{self.family} from {self.source}: {self.dtype} on {self.device}",
            f"schedule     {' '.join(f'({t:g}, {tt:g})' for t, tt in self.schedule)}  (t, tt) of each evaluation",
            f"constants    {'inside the weights' if self.absorbed else f'tables of {len(self.schedule)} row(s)'}",
            f"parameters   {count_text(self.parameters_before)} -> {count_text(self.parameters_after)}",
            f"bytes        {_bytes(self.bytes_before)} -> {_bytes(self.bytes_after)}",
        ]
        lines += [f"folded       {count_text(n):>8}  {name}" for name, n in self.folded.items()]
        lines += [f"pruned       {count_text(n):>8}  {name}" for name, n in self.pruned.items()]
        lines += [f"lora         {lora}" for lora in self.loras]
        for choice in self.choices:
            refusals = "; ".join(f"not {name}: {reason}" for name, reason in choice.refused)
            lines.append(f"op           {choice.op:<20} {choice.chosen}" + (f"  ({refusals})" if refusals else ""))
        lines += [f"linear       {group}" for group in self.layers]
        exempt = {group.name for group in self.sensitivity if group.name in self.exempt}
        for group in self.sensitivity:
            lines.append(f"sensitivity  {group}" + ("  exempt" if group.name in exempt else ""))
        for stage in self.stages:
            floors = ", ".join(f"{name} {duration(t)}" for name, t in stage.floors(CEILINGS).items())
            work = f"{stage.flops / 1e9:,.2f} GFLOP  {_bytes(stage.weight_bytes)} of weights"
            work += f"  {_bytes(stage.activation_bytes)} of activations"
            lines.append(f"stage        {stage.name:<20} {work}  floor: {floors}")
        return "\n".join(lines + [f"note         {note}" for note in self.notes])


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def group_parameters(sizes: dict[str, int]) -> dict[str, int]:
    """Sums parameters by what they were: layer numbers dropped from their names, norm weights together."""
    groups: dict[str, int] = {}
    for name, n in sizes.items():
        key = ".".join(part for part in name.split(".") if not part.isdigit() and part not in ("weight", "bias"))
        key = "norm weights" if "norm" in key.rpartition(".")[2] else key
        groups[key] = groups.get(key, 0) + n
    return groups


def duration(seconds: float | None) -> str:
    """A floor as text."""
    if seconds is None:
        return "unknown"
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"
