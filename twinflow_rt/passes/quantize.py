"""Pack and quantize: what becomes of each linear layer of a network (`layers` has the kinds), and why.

Layers of repeated blocks get 8 or 4 bits where a precision is asked for, but for those that are named as sensitive
and what runs once per prompt. Ops that hand quantized activations to such layers: `ops.table`.

In all functions here, precision is one of `layers.KINDS` or None, and skip_layers are parts of names, with or without
block numbers, of layers that are kept out of it; written NAME:KIND, of layers that get another kind instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.load_report import TRIM_EVERY
from ..checkpoint.reading import MADE
from ..config import dtype_name, has_native, shown
from ..errors import CheckpointError, ConfigError
from ..host_memory import release_free_memory
from ..ops import Target
from ..ops.implementations import FLOAT8_ARCH, INT8_ARCH
from ..ops.int4 import CHUNK, GROUPS, Int4Form, Int4Weight
from ..ops.linear import packing_refuses
from ..ops.selection import Choice, select_quantized
from ..ops.table import quantizing
from .blocks import group_of, in_block, runs_per_prompt
from .layer_groups import Group, Layers
from .layers import (
    GROUP,
    GROUP_MINIMUM,
    GROUP_SCALE,
    KINDS,
    SCALE,
    QuantizedLinear,
    converted,
    declared_values,
    linear_layers,
    quantized_values,
)
from .replace import replace_module

MODULATION = ("norm", "text_embedder")  # layers of one row per prompt, computed in float32 from a plain weight
NARROWEST = 32  # layers of fewer inputs or outputs stay as they are: nothing to gain
SMALLEST_PACKED = 3 << 14  # elements of a float32 weight: calling oneDNN for fewer takes longer than it saves
MULTIPLES = {"fp8": 16, "int8": 8, "int4": 8, "w4a16": 8, "nvfp4": 32}  # of inputs and outputs: for GPUs' products
PRODUCTS = {kind.product for kind in KINDS.values()}


def convert_layers(
    network: nn.Module, device: torch.device, precision: str | None = None, skip_layers: Sequence[str] = ()
) -> tuple[Layers, ...]:
    """Replace the linear layers of a loaded `network` by what suits them on `device`; return what they became.

    With a precision, the layers of its repeated blocks are quantized, but for `skip_layers` and what runs once per
    prompt. Other layers are packed where the CPU can. One weight at a time exists twice.
    Raises ConfigError where the device has no products of that precision.
    """
    require(precision, device, skip_layers=skip_layers)
    done: dict[tuple[str, str], list[int]] = {}
    freed = 0
    for name in [name for name, _ in linear_layers(network)]:
        layer: Any = network.get_submodule(name)
        kind, why = _kind(network, name, layer, device, precision, skip_layers)
        done.setdefault((kind, why), []).append(layer.in_features * layer.out_features)
        freed += layer.weight.nbytes
        layer = converted(layer, kind)
        replace_module(network, name, layer)
        if freed > TRIM_EVERY:  # or the C library keeps the place of every old weight
            freed = 0
            release_free_memory()
    return tuple(Layers(kind, len(sizes), sum(sizes), why) for (kind, why), sizes in done.items())


def quantizes(
    network: nn.Module, name: str, layer: nn.Linear, device: torch.device, precision: str | None,
    skip_layers: Sequence[str],
) -> str | None:  # fmt: skip
    """Return the kind of quantized layer that `convert_layers` would make of the linear layer `name`, or None."""
    kind = None if precision is None else _kind(network, name, layer, device, precision, skip_layers)[0]
    return kind if kind in KINDS else None


def keeps_blocks(source: Checkpoint, precision: str | None, skip_layers: Sequence[str]) -> bool:
    """Return whether weights are held in blocks of 4 bits, or stored in blocks: nothing is to be multiplied into
    them."""
    kinds = {precision or "", *(part.partition(":")[2] for part in skip_layers)} & set(KINDS)
    return source.has_blocks or any(KINDS[kind].in_groups for kind in kinds)


def declare_quantized(
    network: nn.Module, device: torch.device, precision: str | None, skip_layers: Sequence[str] = (),
    in_4_bits: Callable[[str], tuple[Int4Form | None, str]] = lambda name: (None, MADE),
) -> None:  # fmt: skip
    """Put quantized layers on the meta device where `convert_layers` would.

    Their values come later, one by one, in the form that `stored_form` gives them: so a network never exists in two
    precisions at once, only one of its weights. in_4_bits(name): how files have a weight of 4 bits, None where they do
    not, and the origin in words.
    """
    for name, layer in list(linear_layers(network)):
        kind = quantizes(network, name, layer, device, precision, skip_layers)
        if kind is not None and not isinstance(layer, QuantizedLinear):
            form, origin = in_4_bits(f"{name}.weight")
            if form is not None and not KINDS[kind].in_groups:
                origin = "made anew of blocks of 4 bits"
            values = declared_values(kind, layer.out_features, layer.in_features, form or GROUP)
            replace_module(network, name, QuantizedLinear(layer, kind, values, origin))


def stored_form(network: nn.Module, name: str, tensor: Tensor | Int4Weight) -> dict[str, Tensor]:
    """Return what `network` holds for its tensor `name`, read as `tensor`: that, or the tensors of a layer that was
    declared as quantized."""
    owner, _, leaf = name.rpartition(".")
    layer = network.get_submodule(owner)
    if leaf == "weight" and isinstance(layer, QuantizedLinear):
        return {f"{owner}.{leaf}": value for leaf, value in quantized_values(tensor, layer.kind).items()}
    assert isinstance(tensor, Tensor)
    return {name: tensor}


def bind_quantized(network: Any, target: Target) -> tuple[Choice, ...]:
    """Give the quantized layers of `network`, whose `ops` are chosen, their implementations for `target`.

    Returns the choices: none where there is no such layer.
    """
    layers = [m for m in network.modules() if isinstance(m, QuantizedLinear)]
    found: dict[Choice, None] = {}
    for rows in dict.fromkeys(layer.activations for layer in layers):  # int8 for all, in most networks
        some = [layer for layer in layers if layer.activations == rows]
        quantized_ops, choices = select_quantized(replace(target, quantized=rows))
        input_ops = network.ops if rows is None else quantizing(network.ops, quantized_ops, rows)
        for layer in some:
            layer.bind(quantized_ops, input_ops)
        used = {KINDS[layer.kind].product for layer in some}
        found |= dict.fromkeys(c for c in choices if c.op in used or (rows is not None and c.op not in PRODUCTS))
    return tuple(found)


def layer_groups(network: nn.Module, precision: str = "int8") -> dict[str, dict[str, nn.Linear]]:
    """Return the layers that `precision` would quantize in `network`, loaded and not yet quantized: by the name of
    their group (`blocks.group_of`), then by their own."""
    found: dict[str, dict[str, nn.Linear]] = {}
    for name, layer in linear_layers(network):
        if _kind(network, name, layer, torch.device("cpu"), precision, ())[0] == precision:
            found.setdefault(group_of(name), {})[name] = layer
    return found


def check_names(network: nn.Module, skip_layers: Sequence[str], measured: Sequence[Group] = ()) -> None:
    """Raise ConfigError unless `network` has layers of the names in `skip_layers` and the groups that were measured."""
    have: dict[str, list[int]] = {}
    for name, layer in linear_layers(network):
        have.setdefault(group_of(name), []).append(layer.in_features * layer.out_features)
    whole = [name for name, _ in linear_layers(network)]
    if strange := [part for part in skip_layers if ":" in part and part.partition(":")[2] not in KINDS]:
        raise ConfigError(f"skip_layers: {shown(strange[0])} ends in no kind of layers: write NAME:{'|'.join(KINDS)}")
    parts = [part.partition(":")[0] for part in skip_layers]
    if strangers := [part for part in parts if not any(part in name for name in (*whole, *have))]:
        named = ", ".join(strangers)
        raise ConfigError(f"skip_layers: no linear layer is called {named}; the kinds are {', '.join(have)}")
    for group in measured:
        sizes = have.get(group.name, [])
        if (len(sizes), sum(sizes)) != (group.layers, group.parameters):
            raise ConfigError(
                f"the measurement is of another network: it has {group.layers} layers {group.name} of "
                f"{group.parameters} parameters, this one {len(sizes)} of {sum(sizes)}; measure this one"
            )


def refuses(precision: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Return why linear layers cannot multiply in `precision` on `device`, or None.

    dtype: of the network, where known.
    """
    if device.type == "cuda" and precision in ("fp8", "nvfp4") and dtype not in (None, torch.bfloat16):
        return f"{precision}'s products come out in bfloat16, not {dtype_name(dtype)}; use dtype bfloat16"
    have = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if precision == "nvfp4" and (have is None or have[0] != 12):
        found = device.type if have is None else f"compute capability {have[0]}.{have[1]}"
        return f"its products run on NVIDIA GPUs of compute capability 12.0, not on {found}; use int4 there"
    if have is not None:
        needs = divmod(FLOAT8_ARCH if precision == "fp8" else INT8_ARCH, 10)
        if have < needs:
            least, found = (".".join(map(str, version)) for version in (needs, have))
            return f"its products need compute capability {least} or newer, {device} has {found}; use bf16 there"
        return None
    if precision == "fp8":
        return None
    if device.type != "cpu":
        return f"runs on CPUs and NVIDIA GPUs, not on {device}"
    return None if precision != "int8" or torch.backends.mkldnn.is_available() else "needs a torch built with oneDNN"


def require(
    precision: str | None, device: torch.device, dtype: torch.dtype | None = None, skip_layers: Sequence[str] = ()
) -> None:
    """Raise ConfigError where `refuses` has a reason, for any of the kinds of layers that are asked for."""
    named = {part.partition(":")[2] for part in skip_layers} & set(KINDS) if precision else ()
    for kind in ([precision] if precision else []) + sorted(named):
        if reason := refuses(kind, device, dtype):
            raise ConfigError(f"precision {kind}: {reason}")


def expect_quantized(
    network: nn.Module, saved: Checkpoint, precision: str | None, skip_layers: Sequence[str] = ()
) -> set[str]:
    """Put quantized layers on the meta device where a `saved` program of `precision` has them.

    Returns the names of their tensors, which are read in the dtype they are stored in. Raises CheckpointError for
    tensors that no such layer has.
    """
    as_saved: set[str] = set()
    for name, layer in list(linear_layers(network)):
        if f"{name}.{SCALE}" not in saved:
            continue
        if precision is None:
            raise CheckpointError(f"{name} is quantized in a program of no precision; save it again")
        kind, form = _saved_kind(name, layer, saved, _asked(network, name, precision, skip_layers) or precision)
        values = declared_values(kind, layer.out_features, layer.in_features, form)
        names = {f"{name}.{leaf}" for leaf in values}
        if wrong := [n for n in names if n not in saved or saved.dtype(n) != values[n.rpartition(".")[2]].dtype]:
            raise CheckpointError(f"this artifact of precision {precision} lacks {wrong[0]} of {kind}; save it again")
        replace_module(network, name, QuantizedLinear(layer, kind, values))
        as_saved |= names
    return as_saved


def _saved_kind(name: str, layer: nn.Linear, saved: Checkpoint, asked: str) -> tuple[str, Int4Form]:
    """Return the kind of the layer `name` of a saved program, where `asked` was asked for, and its form in 4 bits."""
    stored = f"{name}.{GROUP_SCALE}"
    # in 8 bits, though 4 were asked for, are those whose inputs make no groups
    if asked == "nvfp4" or stored not in saved:
        return ("int8" if KINDS[asked].in_groups else asked), GROUP
    groups = (*saved.shape(stored), 0)[1]
    form = Int4Form(layer.in_features // (groups or 1), f"{name}.{GROUP_MINIMUM}" in saved)
    if form.group not in GROUPS or groups * form.group != layer.in_features:
        raise CheckpointError(f"this artifact has {groups} groups of {layer.in_features} inputs in {name}; save again")
    return (asked if KINDS[asked].in_groups else "int4"), form


def check_quantized(network: nn.Module, device: torch.device, dtype: torch.dtype, precision: str | None) -> None:
    """Raise CheckpointError for weights of a loaded program that `device` cannot multiply; weights of 4 bits are put
    into units that it can."""
    found = [m for m in network.modules() if isinstance(m, QuantizedLinear)]
    if precision is None or not found:
        return
    if reason := refuses(precision, device, dtype):
        raise CheckpointError(f"this artifact holds {precision} weights: {reason}")
    for layer in found:
        multiple = _multiple(layer.kind, device)
        if layer.in_features % multiple or layer.out_features % multiple:
            raise CheckpointError(
                f"this artifact holds {layer.kind} weights whose inputs or outputs are no multiple of "
                f"{multiple}, as {device} needs; compile from the model folder for it"
            )


def dtype_notes(stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """Return a sentence for the plan where weights are held in another dtype than stored because of `device`."""
    if stored == dtype or has_native(stored, device):
        return ()
    kept, held = map(dtype_name, (stored, dtype))
    return (f"stored in {kept}, which this {device.type} only emulates: weights converted to {held} at load",)


def _kind(
    network: nn.Module, name: str, layer: nn.Linear, device: torch.device, precision: str | None,
    skip_layers: Sequence[str],
) -> tuple[str, str]:  # fmt: skip
    """Return the kind that one layer becomes, and the reason."""
    if isinstance(layer, QuantizedLinear):
        if precision is None:
            return layer.kind, "as saved"
        other = _fitting(layer, _asked(network, name, precision, skip_layers) or precision)[1]
        return layer.kind, _how(layer.kind, device, other or layer.origin)
    if min(layer.weight.shape) < NARROWEST or any(part in name for part in MODULATION):
        return "plain", "narrow, or a modulation of one row"
    why = "laid out once, not per call"
    if precision is not None:
        asked = _asked(network, name, precision, skip_layers)
        suited, other = _fitting(layer, asked or precision)
        if asked is None:
            why = f"sensitive: kept out of {precision}"
        elif not in_block(network, name, of_prompt=KINDS[asked].in_groups):
            why = f"embedder, projection or once per prompt: kept out of {precision}"
        elif suited is None:
            why = other
        elif any(n % (multiple := _multiple(suited, device)) for n in layer.weight.shape):
            why = f"inputs or outputs are no multiple of {multiple}: kept out of {precision}"
        else:
            return suited, _how(suited, device, other or MADE)
    if layer.weight.is_meta:  # never in a network of some precision
        return "plain", "its weight comes and goes with its block"
    stored = layer.weight.dtype
    if device.type == "cpu" and stored == torch.bfloat16 and not has_native(stored, device):
        return "upcast", "this CPU has no bfloat16 instructions (AVX512-BF16, AMX)"
    if reason := packing_refuses(device, stored):
        return "plain", reason if precision is None else why
    if stored == torch.float32 and layer.weight.numel() < SMALLEST_PACKED:
        return "plain", "small: multiplied sooner than a packed product is called" if precision is None else why
    return "packed", why


def _asked(network: nn.Module, name: str, precision: str, skip_layers: Sequence[str]) -> str | None:
    """Return the kind that the layer `name` is to have: the first that `skip_layers` has for it, else `precision`,
    whose 4 bits are multiplied by plain rows in what runs once per prompt; None where it is kept out."""
    for part, _, kind in (entry.partition(":") for entry in skip_layers):
        if part in name or part in group_of(name):
            return kind or None
    return "w4a16" if KINDS[precision].in_groups and runs_per_prompt(network, name) else precision


def _fitting(layer: nn.Linear, kind: str) -> tuple[str | None, str]:
    """Return the kind that suits a layer's inputs where `kind` is asked for, and the reason if it is another. None:
    they are not to be rounded, and cannot be grouped."""
    if KINDS[kind].in_groups and layer.in_features % CHUNK:
        other = None if KINDS[kind].rows is None else "int8"
        return other, f"inputs are no multiple of {CHUNK}: kept out of {kind}"
    return kind, ""


def _multiple(kind: str, device: torch.device) -> int:
    """Return what a layer's inputs and outputs must be multiples of: on a GPU; for fp8 everywhere, because a CPU merely
    tries it out."""
    return MULTIPLES[kind] if kind in ("fp8", "nvfp4") or device.type != "cpu" else 1


def _how(kind: str, device: torch.device, origin: str) -> str:
    """Return a word on the products of a quantized layer. origin: of its weight, or why it has this kind."""
    if kind == "fp8":
        emulated = "emulated in float32, slowly: a CPU has no float8 products"
        return emulated if device.type == "cpu" else "e4m3, rows of activations and weights scaled"
    if kind == "nvfp4":
        return "e2m1 in blocks of 16, weights and rows of activations scaled"
    rows = "rows of activations as they are" if KINDS[kind].rows is None else "rows of activations in int8"
    if KINDS[kind].in_groups:
        return f"groups of weights scaled, {origin}; {rows}"
    said = "rows of activations and weights scaled"
    return said if origin in ("", MADE) else f"{origin}; {said}"
