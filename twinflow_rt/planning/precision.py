"""Which precision pays on a device: measurements of it, kept in files, and the choice among them.

`twinflow-rt sensitivity MODEL --save` measures, on this device, what quantizing a network's linear layers does:
the error of one evaluation, for every kind of layer alone and for all that remain, and its time before and
after. `load(..., precision="auto")` reads what was measured here and takes a precision only if it was faster
and its error within the budget; `load(..., skip_layers=FILE)` skips the layers that a measurement says.
Where a memory budget does not hold the network in what was chosen: `mixed_precision`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.atomic import check_target, write_json
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import read_json
from ..checkpoint.typed_json import typed
from ..checkpoint.versions import refusal
from ..config import dtype_name, has_native, resolve_precision
from ..errors import CheckpointError, ConfigError
from ..passes.layer_groups import Group
from ..passes.quantize import refuses
from ..runtime.machine import device_name

SCHEMA = 1
EIGHT_BIT = ("int8", "fp8")
MEASURED = (*EIGHT_BIT, "int4", "bf16")
AUTO = "auto chose "  # how a plan's note on the choice begins
FASTER = 1.03  # by less than this factor, a gain may be noise


@dataclass(frozen=True)
class Measurement:
    """What `precision` did to one network on one device: "int8", "fp8" and "int4" quantize it, "bf16" is another dtype.

    weights: fingerprint of its files. dtype: of the network before. error: of one evaluation but for `skip_layers`,
    left out to stay within `budget`; groups: of every kind of layer quantized alone, those included.
    seconds, seconds_before: medians of one evaluation of the default size, after and before.
    """

    precision: str
    family: str
    weights: str
    device: str
    torch: str
    dtype: str
    budget: float
    skip_layers: tuple[str, ...]
    error: float
    seconds: float
    seconds_before: float
    groups: tuple[Group, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it; `read` reads it back."""
        return {"schema": SCHEMA, **asdict(self)}

    @property
    def path(self) -> Path:
        """Where `load(..., precision="auto")` on this device looks for it."""
        return kept(self.precision, self.weights, self.device, self.dtype)


def read(path: str | Path) -> Measurement:
    """Return a measurement that `twinflow-rt sensitivity --save` wrote. Raises ConfigError for any other file."""
    try:
        raw = read_json(Path(path))
    except CheckpointError as error:
        raise ConfigError(f"{error}; `twinflow-rt sensitivity MODEL --save FILE` writes one") from None
    schema = raw.pop("schema", None)
    if "exempt" in raw:  # as files of earlier versions have it
        raw["skip_layers"] = raw.pop("exempt")
    if schema != SCHEMA or set(raw) != {f.name for f in fields(Measurement)}:
        raise ConfigError(refusal(path, schema, SCHEMA, "measure again"))
    try:
        found: Measurement = typed(raw, Measurement, str(path))
    except ValueError as error:
        raise ConfigError(f"{error}: measure again") from None
    if found.precision not in MEASURED:
        raise ConfigError(f"{path}: precision {found.precision!r:.40} is none of {', '.join(MEASURED)}: measure again")
    return found


@dataclass(frozen=True)
class Arithmetic:
    """What a network computes in; the fields are those of `compile.Recipe`.

    dtype: of everything that has no 8 bits. precision: "int8", "fp8" or None for its linear layers; skip_layers: parts
    of names of those kept out of it. sensitivity: what `skip_layers` was measured by, if it was. notes: on the choice.
    """

    dtype: torch.dtype
    precision: str | None = None
    skip_layers: tuple[str, ...] = ()
    fp8_attention: bool = False
    sensitivity: tuple[Group, ...] = ()
    notes: tuple[str, ...] = ()


def resolve(
    network: Checkpoint, precision: str | None, skip_layers: Sequence[str] | str | Path, fp8_attention: bool,
    device: torch.device, dtype: torch.dtype, free: bool = False,
) -> Arithmetic:  # fmt: skip
    """Return what the arguments of `load` amount to for `network`. free: whether another dtype than
    `dtype` may be chosen for it. Raise ConfigError for arguments that do not go together."""
    if precision == "auto":
        if skip_layers or fp8_attention:
            raise ConfigError("precision 'auto' takes what was measured: leave skip_layers and fp8_attention out")
        found, notes = automatic(network, device, dtype, free)
        stored = of_files(network, device, dtype)
        nothing = f"{stored[0] or dtype_name(dtype)}: nothing was measured that is faster here"
        chosen = nothing if found is None else found.precision
        notes = (AUTO + chosen, *notes)
        if found is None:
            return Arithmetic(dtype, stored[0], notes=notes + stored[1])
        if found.precision == "bf16":
            return Arithmetic(torch.bfloat16, notes=notes)
        return Arithmetic(dtype, found.precision, found.skip_layers, sensitivity=found.groups, notes=notes)
    asked = resolve_precision(precision, None)[0]
    quantized, notes = (asked, ()) if precision else of_files(network, device, dtype)
    if fp8_attention and quantized != "fp8":
        raise ConfigError(f"fp8_attention goes with precision 'fp8', not {precision}")
    names, measured = skipped(skip_layers, quantized)
    if names and quantized is None:
        raise ConfigError("skip_layers names layers kept out of precision 'int8', 'fp8' or 'int4': give one")
    return Arithmetic(dtype, quantized, names, fp8_attention, measured, notes)


def of_files(network: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[str | None, tuple[str, ...]]:
    """Return the precision that keeps the weights of quantized files about as small as they are, None where most of
    `network` is not quantized or `device` has no such products; and a sentence on it."""
    if not network.has_blocks:
        return None, ()
    numbers = {name: network.numel(name) for name in network}
    for kind, bits in (("int4", 5), ("int8", 9)):
        if 2 * sum(n for name, n in numbers.items() if 8 * network.nbytes(name) <= bits * n) > sum(numbers.values()):
            if reason := refuses(kind, device, dtype):
                return None, (f"quantized files are read as {dtype_name(dtype)}: {kind} {reason}",)
            return kind, (f"precision {kind}: most weights are stored in {bits} bits at most; 'bf16' reads them dense",)
    return None, ()


def skipped(
    skip_layers: Sequence[str] | str | Path, precision: str | None
) -> tuple[tuple[str, ...], tuple[Group, ...]]:
    """Return parts of names of layers kept out of `precision`, and what was measured of it if they come from a file:
    the path of one, or a list of names that is nothing but one. Raise ConfigError."""
    if isinstance(skip_layers, (str, Path)):
        file = skip_layers
    elif len(skip_layers) == 1 and str(skip_layers[0]).endswith(".json"):
        file = skip_layers[0]
    else:
        return tuple(skip_layers), ()
    found = read(file)
    if found.precision != precision:
        raise ConfigError(f"{file} was measured for precision {found.precision}, not {precision or 'a dtype'}")
    return found.skip_layers, found.groups


def choose(measured: Mapping[str, Measurement | None]) -> tuple[Measurement | None, tuple[str, ...]]:
    """Return the fastest precision that measured faster than none and within its budget, and a sentence on each.

    measured: by precision, None where it was not measured. A pure function: no device is asked.
    """
    fit, said = [], []
    for name, found in measured.items():
        if found is None:
            command = f"`twinflow-rt sensitivity MODEL --precision {name} --save`"
            said.append(f"auto: {name} was not measured here ({command} does)")
            continue
        gain = found.seconds_before / found.seconds
        state = f"measured {gain:.2f}x as fast, error {found.error:.2e} of at most {found.budget:g}"
        passed = gain >= FASTER and found.error <= found.budget
        said.append(f"auto: {name} {state}" + ("" if passed else ": not taken"))
        fit += [found] * passed
    return min(fit, key=lambda found: found.seconds, default=None), tuple(said)


def automatic(
    network: Checkpoint, device: torch.device, dtype: torch.dtype, free: bool = False
) -> tuple[Measurement | None, tuple[str, ...]]:
    """`choose` among the precisions that `device` multiplies, by what was measured here of `network`.
    free: bfloat16 is one of them, in place of a float32 that nobody asked for."""
    names = [name for name in EIGHT_BIT if refuses(name, device, dtype) is None]
    names = [name for name in names if (name, device.type) != ("fp8", "cpu")]  # emulated there
    names += ["bf16"] * (free and refuses_bf16(device, dtype) is None)
    try:
        paths = kept_here(names, network, device, dtype)
    except ConfigError as error:  # then nothing can have been measured
        return None, (f"auto: {error}",)
    return choose({name: read(path) if os.path.isfile(path) else None for name, path in paths.items()})


def refuses_bf16(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why bfloat16 is no choice in the place of `dtype` on `device`, or None."""
    if dtype != torch.float32:
        return f"bf16 is measured against float32, not {dtype_name(dtype)}"
    return None if has_native(torch.bfloat16, device) else f"this {device.type} only emulates bfloat16"


def kept_here(
    names: Sequence[str], network: Checkpoint, device: torch.device, dtype: torch.dtype
) -> dict[str, Path]:  # fmt: skip
    """Return where measurements of `network` in these precisions lie; see `kept`."""
    here = fingerprint(network), device_name(device), dtype_name(dtype)
    return {name: kept(name, *here) for name in names}


def kept(precision: str, weights: str, device: str, dtype: str) -> Path:
    """Return where a measurement on this machine lies in the user's cache; one of another torch is not found. Raises
    ConfigError where the user has no home folder, as in containers, and XDG_CACHE_HOME names no other place."""
    key = hashlib.sha256("\n".join((weights, device, dtype, torch.__version__)).encode()).hexdigest()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither HOME nor an entry in the list of users
        raise ConfigError(
            "there is no home folder to keep measurements in: set HOME or XDG_CACHE_HOME, or name a file (--save FILE)"
        ) from None
    return cache / "twinflow_rt" / "precision" / f"{key[:32]}-{precision}.json"


def check_save(path: str | Path | None = None) -> None:
    """Raise ConfigError where `save` could not write, before anything is measured."""
    target = kept("", "", "", "") if path is None else Path(path)
    check_target(target, "--save", make_parents=path is None)


def save(found: Measurement, path: str | Path | None = None) -> Path:
    """Write a measurement, to where `automatic` finds it unless a path is given."""
    path = found.path if path is None else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_json(path, found.to_dict())


def fingerprint(network: Checkpoint) -> str:
    """Return a hash of a network's config and of the names and sizes of its weight files, which are not read."""
    digest = hashlib.sha256(json.dumps(network.config, sort_keys=True).encode())
    digest.update("".join(f"{path.name} {path.stat().st_size}\n" for path in network.paths).encode())
    return digest.hexdigest()
