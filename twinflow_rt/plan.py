"""The plan: what the compile path decided and what it expects (`planning.roofline`), as data and as text."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .checkpoint.lora import Lora
from .checkpoint.typed_json import typed
from .checkpoint.versions import refusal
from .config import DTYPES, PRECISIONS
from .errors import CheckpointError
from .ops.selection import Choice
from .passes.layer_groups import Group, Layers, count_text, treatment
from .planning.precision import AUTO
from .planning.roofline import CEILINGS, StageWork, duration

SCHEMA = 5
OLD_NAMES = {"exempt": "skip_layers", "narrow_flops": "eight_bit_flops"}  # of fields, in plans saved before


@dataclass(frozen=True, repr=False)
class Plan:
    """Everything a compiled program can tell about itself; `print(plan)` shows all of it.

    folded, pruned: parameters that became constants, and those whose output nothing reads, by kind.
    absorbed: the constants of the one evaluation are inside the weights; else they are tables.
    precision, skip_layers: of linear layers, or None, and names kept out of it. sensitivity: the errors that were
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
    skip_layers: tuple[str, ...] = ()
    sensitivity: tuple[Group, ...] = ()
    layers: tuple[Layers, ...] = ()
    fp8_attention: bool = False
    stages: tuple[StageWork, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exempt(self) -> tuple[str, ...]:
        """What `skip_layers` was called before."""
        warnings.warn("Plan.exempt is called Plan.skip_layers now", DeprecationWarning, stacklevel=2)
        return self.skip_layers

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; `from_dict` reads it back."""
        return {"schema": SCHEMA, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Plan:
        """Return the plan that `to_dict` made this of. Raises CheckpointError for another schema, other fields, or a
        field that is not what it should be."""
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema != SCHEMA:
            raise CheckpointError(refusal("the plan", schema, SCHEMA, "compile again"))
        raw = _renamed(raw)
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

    @property
    def arithmetic(self) -> str:
        """What the network computes in, in words, and whether precision "auto" chose it."""
        what = self.dtype if self.precision is None else f"{self.precision} linear layers, {self.dtype} otherwise"
        what += ", fp8 attention" * self.fp8_attention
        return what + " (chosen by auto)" * any(note.startswith(AUTO) for note in self.notes)

    def __repr__(self) -> str:
        evaluations, parameters = len(self.schedule), count_text(self.parameters_after)
        return (
            f"Plan({self.family} from {self.source}: {self.arithmetic}, on {self.device}; {evaluations} evaluation(s), "
            f"{parameters} parameters, {_bytes(self.bytes_after)})"
        )

    def __str__(self) -> str:
        lines = [
            f"{self.family} from {self.source}: {self.dtype} on {self.device}",
            f"precision    {self.arithmetic}",
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
        for group in self.sensitivity:
            lines.append(f"sensitivity  {group}{treatment(group, self.skip_layers)}")
        for stage in self.stages:
            floors = ", ".join(f"{name} {duration(t)}" for name, t in stage.floors(CEILINGS).items())
            work = f"{stage.flops / 1e9:,.2f} GFLOP  {_bytes(stage.weight_bytes)} of weights"
            work += f"  {_bytes(stage.activation_bytes)} of activations"
            lines.append(f"stage        {stage.name:<20} {work}  floor: {floors}")
        return "\n".join(lines + [f"note         {note}" for note in self.notes])


def _renamed(value: Any) -> Any:
    """Return a saved plan's content under today's names of fields."""
    if isinstance(value, dict):
        return {OLD_NAMES.get(key, key): _renamed(item) for key, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"
