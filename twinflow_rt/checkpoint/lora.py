"""LoRA adapters, merged into a checkpoint's tensors as they are read (arXiv 2106.09685):

    W' = W + sum_i  weight_i * alpha_i / rank_i * B_i A_i        A [rank, in], B [out, rank]

in float32 on the target device, one tensor at a time, rounded once to what the network keeps. The
result reads like the checkpoint itself, so every later pass sees merged weights: a modulation or
time embedder that an adapter touches is merged before it is folded.

Files are safetensors as diffusers and PEFT save them (`transformer.<module>.lora_A.weight`), or with
the older names (`lora_down`, `lora_unet_<module with underscores>`, `.alpha`). Where no alpha is
given, neither as a tensor nor in the metadata, it is the rank: diffusers' rule.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import check_path, items, number, shown
from ..errors import CheckpointError, ConfigError
from ..ops.int4 import Int4Form
from .artifact import sha256
from .checkpoint import Checkpoint
from .files import PICKLES, file_type, is_folder, open_tensors, parse_json, read_json, require_file, some
from .tensor_files import read_tensor

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
FACTOR = re.compile(r"(.+)\.(lora_A|lora_down|lora\.down|lora_B|lora_up|lora\.up)(?:\.([^.]+))?\.weight")
FACTORS = ("F32", "F16", "BF16", "F64")  # how A and B may be stored
A_NAMES = ("lora_A", "lora_down", "lora.down")
METADATA, ROOT = "lora_adapter_metadata", "transformer."  # diffusers' header entry, and our keys in it
PEFT, PEFT_CONFIG = "base_model.model.", "adapter_config.json"  # PEFT's names of tensors, and its file beside them
REBASED = ("pissa", "olora", "corda")  # initialisations after which A and B belong to other base weights


@dataclass(frozen=True)
class Lora:
    """An adapter merged into the weights: its file's name, its weight, the file's SHA-256."""

    name: str
    weight: float
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} x {self.weight:g}"


Loras = Mapping[str | Path, float] | Sequence[str | Path | tuple[str | Path, float]]


def resolve_loras(loras: Loras) -> tuple[tuple[Path, float], ...]:
    """Return (path, weight) pairs of {path: weight}, [(path, weight), ...] or [path, ...] (weight 1)."""
    if isinstance(loras, (str, os.PathLike)):
        raise ConfigError(f"loras must be a list or a mapping, not one path; write loras=[{shown(loras)}]")
    entries = list(loras.items()) if isinstance(loras, Mapping) else items(loras)
    if entries is None:
        raise ConfigError(f"loras must be a list of paths or a mapping {{path: weight}}; got {shown(loras)}")
    pairs = []
    for entry in entries:
        path, weight = entry if isinstance(entry, (tuple, list)) and len(entry) == 2 else (entry, 1.0)
        if not isinstance(path, (str, os.PathLike)) or (found := number(weight)) is None:
            raise ConfigError(f"loras holds {shown(entry)}; each must be a path, or a path and a finite weight")
        pairs.append((Path(check_path("a path in loras", path)), found))
    return tuple(pairs)


def require_same(merged: Sequence[Lora], asked: Sequence[tuple[Path, float]] | None) -> None:
    """Raise ConfigError where other adapters are asked for than those `merged` into an artifact.

    None asks for none in particular. Compared are weights and the files' content, in any order.
    """
    if asked is None:
        return
    wanted = [Lora(_file(path).name, weight, sha256(_file(path))) for path, weight in asked]
    if sorted((x.sha256, x.weight) for x in wanted) != sorted((x.sha256, x.weight) for x in merged):
        has, other = (", ".join(map(str, loras)) or "no adapter" for loras in (merged, wanted))
        raise ConfigError(
            f"this artifact has {has} in its weights, not {other}: load the model folder instead, or save another"
        )


class Merged(Checkpoint):
    """A checkpoint with adapters merged in; reads like the checkpoint alone.

    loras: (path, weight) of each, as `resolve_loras` gives. check_finite: whether NaN and infinity in adapters are
    refused. files: `files` and `config` of a `Checkpoint`. Raises CheckpointError for what `Checkpoint` and `Adapter`
    refuse.
    """

    def __init__(
        self, folder: str | Path, loras: Sequence[tuple[Path, float]], check_finite: bool = True, **files: Any
    ) -> None:
        super().__init__(folder, **files)
        self.adapters = tuple(Adapter(path, weight, self) for path, weight in loras)
        if check_finite:
            for adapter in self.adapters:
                adapter.require_finite()
        self.loras = tuple(adapter.facts for adapter in self.adapters)

    def int4_form(self, name: str) -> Int4Form | None:
        return None if any(name in adapter for adapter in self.adapters) else super().int4_form(name)

    def get(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        touching = [adapter for adapter in self.adapters if name in adapter]
        if not touching:
            return super().get(name, device, dtype)
        merged = super().get(name, device, torch.float32)
        for adapter in touching:
            merged = adapter.merge(name, merged)
        return merged.to(dtype or self.dtype(name))


class Adapter:
    """One LoRA file and its weight, matched against the checkpoint it will be merged into.

    path: the file, or a folder that holds it. Opening reads headers, alphas and the file's hash.
    Raises CheckpointError for a missing file, a pickle, a target the checkpoint lacks, half a pair,
    a wrong shape, or a kind of adapter that is more than A and B (DoRA, biases).
    """

    def __init__(self, path: Path, weight: float, checkpoint: Checkpoint) -> None:
        self.path = _file(path)
        self._tensors = open_tensors(self.path)
        self.facts = Lora(self.path.name, weight, sha256(self.path))
        self._pairs: dict[str, tuple[str, str, float]] = {}  # tensor of the checkpoint -> keys of A, B; factor
        config, modules = self._config(), (n.removesuffix(".weight") for n in checkpoint if n.endswith(".weight"))
        flat = {module.replace(".", "_"): module for module in modules}
        for module, keys in self._modules().items():
            name, rank = self._target(module, keys, flat, checkpoint)
            if name in self._pairs:
                raise CheckpointError(f"{self.path} has two adapters for {name}; keep one")
            alpha = self._alpha(config, name)
            if "alpha" in keys:
                stored = read_tensor(self._tensors, keys["alpha"])
                alpha = stored.item() if stored.numel() == 1 else f"of shape {tuple(stored.shape)}"
            if alpha is not None and number(alpha) is None:
                raise CheckpointError(
                    f"{self.path}: the alpha of {module} is {alpha!r:.40}, not a finite number; save it again"
                )
            self._pairs[name] = (keys["A"], keys["B"], weight * _ratio(alpha, rank, config))
        if not self._pairs:
            raise CheckpointError(f"{self.path} holds no LoRA tensors (lora_A and lora_B)")

    def __contains__(self, name: str) -> bool:
        return name in self._pairs

    def require_finite(self) -> None:
        """Raise CheckpointError for factors that hold NaN or infinity, or whose multiplier is beyond float32."""
        for name, (a, b, factor) in self._pairs.items():
            if abs(factor) > torch.finfo(torch.float32).max or not all(
                read_tensor(self._tensors, key).isfinite().all() for key in (a, b)
            ):
                raise CheckpointError(
                    f"{self.path}: what it adds to {name} is NaN or infinity: damaged, or trained so; get it again, or "
                    "pass check_finite=False"
                )

    def merge(self, name: str, base: Tensor) -> Tensor:
        """Return `base` (float32) plus this adapter's share of tensor `name`, as a new tensor."""
        *keys, factor = self._pairs[name]
        a, b = (read_tensor(self._tensors, key).to(base.device).float() for key in keys)
        return torch.addmm(base, b, a, alpha=factor)

    def _modules(self) -> dict[str, dict[str, str]]:
        """Return by module, as the file names it, its keys "A", "B" and, if stored, "alpha"."""
        modules: dict[str, dict[str, str]] = {}
        others, adapters = [], set()
        for key in self._tensors.keys():  # noqa: SIM118  safe_open is no mapping
            if match := FACTOR.fullmatch(key):
                modules.setdefault(match[1], {})["A" if match[2] in A_NAMES else "B"] = key
                adapters.add(match[3] or "default")
            elif key.endswith(".alpha"):
                modules.setdefault(key.removesuffix(".alpha"), {})["alpha"] = key
            else:
                others.append(key)
        if others:
            raise CheckpointError(
                f"{self.path} holds {some(others)}, which is no LoRA factor: only adapters of A and B can be merged"
            )
        if len(adapters) > 1:
            raise CheckpointError(f"{self.path} holds several adapters ({some(adapters)}); save each in its own file")
        return modules

    def _target(
        self, module: str, keys: dict[str, str], flat: dict[str, str], checkpoint: Checkpoint
    ) -> tuple[str, int]:
        """Return the checkpoint's tensor that `module` adapts, and the adapter's rank; compare shapes."""
        name = module
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        for prefix in FLAT_PREFIXES:
            name = flat.get(name.removeprefix(prefix), name)
        name += ".weight"
        if name not in checkpoint:
            raise CheckpointError(f"{self.path} adapts {module}, which {checkpoint.folder} lacks; for another model?")
        if missing := [f"lora_{kind}" for kind in "AB" if kind not in keys]:
            raise CheckpointError(f"{self.path}: {module} lacks {missing[0]}; the file is incomplete")
        slices = [self._tensors.get_slice(keys[kind]) for kind in "AB"]
        if strange := [s.get_dtype() for s in slices if s.get_dtype() not in FACTORS]:
            raise CheckpointError(
                f"{self.path}: {module} is stored as {strange[0]}; save it as one of {', '.join(FACTORS)}"
            )
        a, b = (tuple(s.get_shape()) for s in slices)
        base = checkpoint.shape(name)
        if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != base or a[0] != b[1] or a[0] < 1:
            raise CheckpointError(
                f"{self.path}: {module} has A {a} and B {b}, which do not make the {base} of {name}; for another model?"
            )
        return name, a[0]

    def _config(self) -> dict[str, Any]:
        """Return the adapter's configuration: from the file's header (diffusers) or beside it (PEFT), or empty.

        In a header its keys follow `transformer.` where the file may hold adapters of other parts too
        (diffusers' save_lora_weights), or stand alone (save_lora_adapter)."""
        config: dict[str, Any] = {}
        if raw := (self._tensors.metadata() or {}).get(METADATA):
            try:
                found = parse_json(raw)
                config = {k.removeprefix(ROOT): v for k, v in found.items() if k.startswith(ROOT)}
                config = config or {k: v for k, v in found.items() if "." not in k}
            except (ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{self.path}: its {METADATA} is not readable JSON ({error}); save it again"
                ) from None
        elif (beside := self.path.with_name(PEFT_CONFIG)).is_file() and self._is_peft():
            config = read_json(beside)
        kind, start = config.get("peft_type") or "LORA", config.get("init_lora_weights")
        if kind != "LORA":
            raise CheckpointError(f"{self.path} is an adapter of type {kind!r:.40}; only LoRA is merged")
        if config.get("use_dora"):
            raise CheckpointError(f"{self.path} is a DoRA adapter, which rescales whole weights; only LoRA is merged")
        if isinstance(start, str) and start.lower().startswith(REBASED):
            raise CheckpointError(
                f"{self.path} began as {start!r:.40}, which changed the base weights as well: convert it to a plain "
                "LoRA (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...))"
            )
        return config

    def _is_peft(self) -> bool:
        """Return whether a configuration beside the file is about it: by the names of its tensors, or as the only
        safetensors file there."""
        named = self.path.name == FILE_NAMES[1] or any(key.startswith(PEFT) for key in self._tensors.keys())  # noqa: SIM118
        return named or [*self.path.parent.glob("*.safetensors")] == [self.path]

    def _alpha(self, config: dict[str, Any], name: str) -> Any:
        """Return the alpha of the module behind tensor `name` by the configuration; None: it says nothing."""
        module, patterns = name.removesuffix(".weight"), config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self.path}: alpha_pattern is {patterns!r:.60}, no object of names; save it again")
        for pattern, alpha in patterns.items():
            literal = pattern.removeprefix("^")
            if re.search(r"[^\w.]", literal):
                raise CheckpointError(f"{self.path}: alpha_pattern {pattern!r} is a regular expression; name modules")
            if module == literal or (literal == pattern and module.endswith("." + literal)):
                return alpha
        return config.get("lora_alpha")


def _ratio(alpha: float | None, rank: int, config: dict[str, Any]) -> float:
    """Return what multiplies B A: alpha / rank, alpha / sqrt(rank) for rank-stabilised adapters, 1 without alpha."""
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _file(path: Path) -> Path:
    """Return the adapter file at `path`; in a folder, the one under the name that diffusers or PEFT gives it, else the
    only one, there or in a folder of it (PEFT makes one of every adapter that has a name)."""
    if is_folder(path):
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        found = found or sorted(path.glob("*.safetensors")) or sorted(path.glob("*/*.safetensors"))
        if len(found) == 1:
            return _file(found[0])
        if found:
            names = some(str(p.relative_to(path)) for p in found)
            raise CheckpointError(f"{path} holds {names}; name the one to merge")
        if pickles := [p.name for p in path.iterdir() if p.suffix in PICKLES]:
            raise CheckpointError(
                f"{path} holds only pickles ({some(pickles)}), which can run code when read; convert them with "
                "safetensors.torch.save_file"
            )
        raise CheckpointError(f"{path} holds no adapter; give a folder with one of {', '.join(FILE_NAMES)}, or a file")
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when read; convert it with safetensors.torch.save_file"
        )
    if not file_type(path):
        raise CheckpointError(f"{path} does not exist; give a LoRA file (.safetensors) or the folder that holds it")
    require_file(path)
    return path
