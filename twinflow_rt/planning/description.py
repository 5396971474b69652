"""What a model folder holds and what an image costs, from configs and file headers alone: no weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.checkpoint import OWN_FILES, Checkpoint, Files
from ..checkpoint.layout import Layout, check
from ..checkpoint.model_folder import model_folder
from ..checkpoint.reading import assign
from ..config import dtype_name
from ..errors import ConfigError
from ..families import family_of
from ..passes.convolutions import fold_upsampling
from ..passes.fold import folded_away
from ..stages import stage
from .memory_costs import GPU, Network, weights_of
from .meta_model import FOLDED
from .parameters import group_parameters
from .roofline import CEILINGS, Ceiling, StageWork, duration
from .work import PROMPT_TOKENS, predict_stages

# the transformer's linear layers, the rest; float16 as bfloat16. int8 stands beside float32 on a CPU
PRECISIONS = {
    "float32": (None, torch.float32), "bfloat16": (None, torch.bfloat16), "int8": ("int8", torch.float32),
    "fp8": ("fp8", torch.bfloat16), "int4": ("int4", torch.bfloat16),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One network: parameters in the files, parameters inference needs, how most of them are stored."""

    name: str
    dtype: str
    stored: int
    needed: int
    stored_bytes: int


@dataclass(frozen=True)
class Description:
    """parts; folded: parameters of the transformer that a fixed schedule turns into constants, by kind;
    memory: bytes of weights resident on the device per precision, after folding (activations excluded).
    size, tokens, dtype: of the image, its prompt and the arithmetic that `stages` is for: what each stage computes
    and moves. floors: the least time it can take, in seconds, per stage and machine of known ceilings."""

    family: str
    path: str
    parts: tuple[Part, ...]
    folded: dict[str, int]
    memory: dict[str, int]
    size: tuple[int, int]
    tokens: int
    dtype: str
    stages: tuple[StageWork, ...]
    floors: dict[str, dict[str, float | None]]

    @property
    def folded_share(self) -> float:
        """Folded parameters as a share of the transformer's."""
        return sum(self.folded.values()) / next(p.stored for p in self.parts if p.name == "transformer")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folded_share": self.folded_share}

    def __str__(self) -> str:
        lines = [
            f"{self.family} model at {self.path}",
            "",
            f"{'part':<15} {'dtype':<9} {'parameters':>14} {'needed':>14} {'on disk':>13}",
        ]
        for p in self.parts:
            size = f"{p.stored_bytes / 1e6:,.2f} MB"
            lines.append(f"{p.name:<15} {p.dtype:<9} {p.stored:>14,} {p.needed:>14,} {size:>13}")
        total = sum(self.folded.values())
        lines += [
            "",
            f"constant at a fixed schedule, folded away: {total:,} ({self.folded_share:.1%} of the transformer)",
        ]
        lines += [f"  {n:>12,}  {name}" for name, n in self.folded.items()]
        lines += ["", "weights resident after folding, without activations:"]
        lines += [f"  {name:<9} {size / 1e6:>11,.2f} MB" for name, size in self.memory.items()]
        return "\n".join([*lines, "", *self._work()])

    def _work(self) -> list[str]:
        height, width = self.size
        machines = [f"{name:>12}" for name in next(iter(self.floors.values()))]
        lines = [
            f"work of one {width}x{height} image from {self.tokens} prompt tokens at one evaluation, {self.dtype}; "
            "the least time it takes:",
            "".join(("stage             GFLOP       weights   activations", *machines)),
        ]
        for s in self.stages:
            floors = "".join(f"{duration(seconds):>12}" for seconds in self.floors[s.name].values())
            moved = f"{s.weight_bytes / 1e6:>11,.2f} MB{s.activation_bytes / 1e6:>11,.2f} MB"
            lines.append(f"{s.name:<9} {s.flops / 1e9:>13,.2f}{moved}{floors}")
        return lines


def describe(
    path: Path, size: tuple[int | None, int | None] = (None, None), tokens: int = PROMPT_TOKENS,
    dtype: torch.dtype | None = None, ceilings: Mapping[str, Any] | None = None, files: Files = OWN_FILES,
) -> Description:  # fmt: skip
    """Describes a model folder; raises CheckpointError where loading it would.

    size, tokens, dtype: height and width of the image whose work is counted, length of its prompt, and what it is
    computed in; default: the model's size, a short prompt, the checkpoint's dtype. ceilings: those in a bench's record,
    for whose machine the least times are stated, too, beside those of `roofline.CEILINGS`. files: what is read in
    place of the folder's networks. Raises ConfigError for what these cannot be.
    """
    folder = model_folder(path)
    transformer = Checkpoint.of_part(folder / "transformer", files)
    family = family_of(transformer.config)
    scheduler = family.scheduler(folder, transformer)
    text, vae, sizes = family.open(folder, transformer.config, files)
    config = family.config.from_dict(transformer.config)
    network, folded = family.build(config), family.build(config, folded_steps=1)
    parts = (
        *(_part(p, p.network) for p in text.parts),
        _part(stage.Part("transformer", transformer, network, family.layout), folded),
        *(_part(p, p.network) for p in vae.parts),
    )
    plain, memory = Network(folded, transformer, family.layout), {}
    for name, (kind, held_in) in PRECISIONS.items():
        weights = weights_of(text, vae, replace(plain, precision=kind), GPU, held_in)
        memory[name] = sum(one.held(0, 0) for one in weights.values())
    away = group_parameters(folded_away(network, folded))
    size, dtype = sizes.resolve(*size), dtype or transformer.main_dtype()
    if not 1 <= tokens <= text.max_tokens:
        raise ConfigError(f"tokens must be 1 to {text.max_tokens} for this model's prompts, not {tokens}")
    for part in (*text.parts, *vae.parts):
        _in_dtype(part.network, part.layout, dtype)
        fold_upsampling(part.network, FOLDED)
    _in_dtype(folded, family.layout, dtype)
    stages = predict_stages(text, folded, vae, *size, dtype, tokens)
    known: dict[str, Ceiling] = CEILINGS if ceilings is None else {**CEILINGS, "measured": _measured(ceilings, dtype)}
    floors = {stage.name: stage.floors(known) for stage in stages}
    kind = "" if scheduler is None else f", an ordinary flow model sampled by {scheduler.kind}"
    where = "".join((str(path), kind, *(f", {part} from {file.folder}" for part, file in files.items())))
    return Description(family.name, where, parts, away, memory, size, tokens, dtype_name(dtype), stages, floors)


def _in_dtype(network: nn.Module, layout: Layout, dtype: torch.dtype) -> None:
    """Has the parameters of a network on the meta device be of the dtypes they are loaded in."""
    for name, parameter in list(network.named_parameters()):
        assign(network, name, parameter.to(layout.dtype_of(name, dtype) or dtype))


def _measured(found: Mapping[str, Any], dtype: torch.dtype) -> Ceiling:
    """Return what a machine was measured to reach in `dtype`. found: the ceilings in a record of `twinflow-rt bench`.

    Raises ConfigError where they are of other dtypes.
    """
    name = dtype_name(dtype)
    if name not in found["gemm"]:
        known = ", ".join(found["gemm"])
        raise ConfigError(f"the record has ceilings of {known}, not {name}: bench with --dtype {name}")
    return Ceiling(found["gemm"][name], found["copy"], found["gemm"].get("float8"))


def _part(part: stage.Part, resident: nn.Module) -> Part:
    checkpoint, expected = part.checkpoint, part.network.state_dict()
    check(expected, checkpoint, part.layout)
    stored_bytes = sum(checkpoint.nbytes(k) for k in checkpoint)
    stored = sum(checkpoint.numel(k) for k in checkpoint)
    needed = sum(t.numel() for name, t in resident.state_dict().items() if name in expected)
    return Part(part.name, dtype_name(checkpoint.main_dtype()), stored, needed, stored_bytes)
