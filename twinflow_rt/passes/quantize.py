"""Pack and quantize: what becomes of each linear layer of a network (`layers` has the kinds), and why.

Layers of repeated blocks get 8 bits where a precision is asked for, but for those that are named as sensitive
and what runs once per prompt. Ops that hand quantized activations to such layers: `ops.table`.

In all functions here, precision is "int8", "fp8" or None, and skip_layers are parts of names, with or without block
numbers, of layers that are kept out of it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.load_report import TRIM_EVERY
from ..config import dtype_name, has_native
from ..errors import CheckpointError, ConfigError
from ..host_memory import release_free_memory
from ..ops import Target
from ..ops.implementations import FLOAT8_ARCH, INT8_ARCH
from ..ops.linear import packing_refuses
from ..ops.selection import Choice, select_quantized
from ..ops.table import quantizing
from .blocks import group_of, in_block
from .layer_groups import Group, Layers
from .layers import (
    ACTIVATION_DTYPES,
    SCALE,
    WEIGHT_DTYPES,
    QuantizedLinear,
    converted,
    largest_int8,
    linear_layers,
    quantized_values,
)
from .replace import replace_module

MODULATION = ("norm", "text_embedder")  # layers of one row per prompt, computed in float32 from a plain weight
NARROWEST = 32  # layers of fewer inputs or outputs stay as they are: nothing to gain
SMALLEST_PACKED = 3 << 14  # elements of a float32 weight: calling oneDNN for fewer takes longer than it saves
MULTIPLES = {"fp8": 16, "int8": 8}  # of inputs and outputs of a layer: the products' alignment on a GPU


def convert_layers(
    network: nn.Module, device: torch.device, precision: str | None = None, skip_layers: Sequence[str] = ()
) -> tuple[Layers, ...]:
    """Replace the linear layers of a loaded `network` by what suits them on `device`; return what they became.

    With a precision, the layers of its repeated blocks are quantized, but for `skip_layers` and what runs once per
    prompt. Other layers are packed where the CPU can. One weight at a time exists twice.
    Raises ConfigError where the device has no products of that precision.
    """
    require(precision, device)
    done: dict[tuple[str, str], list[int]] = {}
    freed = 0
    for name in [name for name, _ in linear_layers(network)]:
        layer: Any = network.get_submodule(name)
        kind, why = _kind(network, name, layer, device, precision, skip_layers)
        done.setdefault((kind, why), []).append(layer.weight.numel())
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
    """Return the 8-bit precision that `convert_layers` would give the linear layer `name`, or None."""
    kind = None if precision is None else _kind(network, name, layer, device, precision, skip_layers)[0]
    return kind if kind in WEIGHT_DTYPES else None


def quantize_on_arrival(
    network: nn.Module, name: str, device: torch.device, precision: str | None, skip_layers: Sequence[str] = ()
) -> None:
    """Quantize a layer as soon as its weight, the tensor `name`, is there, if `convert_layers` would.

    So a network never exists in two precisions at once, only one of its weights.
    """
    owner, _, leaf = name.rpartition(".")
    layer = network.get_submodule(owner)
    if leaf != "weight" or not isinstance(layer, nn.Linear) or isinstance(layer, QuantizedLinear):
        return
    if (kind := quantizes(network, owner, layer, device, precision, skip_layers)) is not None:
        replace_module(network, owner, QuantizedLinear(layer, kind))


def declare_quantized(
    network: nn.Module, names: Container[str], device: torch.device, precision: str | None,
    skip_layers: Sequence[str] = (),
) -> None:  # fmt: skip
    """Put quantized layers on the meta device where `convert_layers` would, for the weights in `names`.

    Their values come later, one by one, in the form that `stored_form` gives them.
    """
    for name, layer in list(linear_layers(network)):
        kind = quantizes(network, name, layer, device, precision, skip_layers)
        if kind is not None and f"{name}.weight" in names:
            replace_module(network, name, converted(layer, kind))


def stored_form(network: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return what `network` holds for its tensor `name`, read as `tensor`: that, or the weight and scales of a layer
    that was declared as quantized."""
    owner, _, leaf = name.rpartition(".")
    layer = network.get_submodule(owner)
    if leaf != "weight" or not isinstance(layer, QuantizedLinear):
        return {name: tensor}
    return dict(zip((name, f"{owner}.{SCALE}"), quantized_values(tensor, layer.kind), strict=True))


def bind_quantized(network: Any, target: Target) -> tuple[Choice, ...]:
    """Give the quantized layers of `network`, whose `ops` are chosen, their implementations for `target`.

    Returns the choices: none where there is no such layer.
    """
    layers = [m for m in network.modules() if isinstance(m, QuantizedLinear)]
    choices: tuple[Choice, ...] = ()
    for kind in {layer.kind for layer in layers}:  # one, of the networks made here
        activations = ACTIVATION_DTYPES[kind]
        quantized_ops, choices = select_quantized(replace(target, quantized=activations))
        input_ops = quantizing(network.ops, quantized_ops, activations)
        for layer in layers:
            if layer.kind == kind:
                layer.bind(quantized_ops, input_ops)
    return choices


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
        have.setdefault(group_of(name), []).append(layer.weight.numel())
    whole = [name for name, _ in linear_layers(network)]
    if strangers := [part for part in skip_layers if not any(part in name for name in (*whole, *have))]:
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
    """Return why linear layers cannot multiply in `precision`, "int8" or "fp8", on `device`, or None.

    dtype: of the network, where known.
    """
    if device.type == "cuda":
        if precision == "fp8" and dtype not in (None, torch.bfloat16):
            return f"float8 products come out in bfloat16, not {dtype_name(dtype)}; use dtype bfloat16"
        needs = divmod(FLOAT8_ARCH if precision == "fp8" else INT8_ARCH, 10)
        if (have := torch.cuda.get_device_capability(device)) < needs:
            least, found = (".".join(map(str, version)) for version in (needs, have))
            return f"its products need compute capability {least} or newer, {device} has {found}; use bf16 there"
        return None
    if precision == "fp8":
        return None
    if device.type != "cpu":
        return f"runs on CPUs and NVIDIA GPUs, not on {device}"
    return None if torch.backends.mkldnn.is_available() else "needs a torch built with oneDNN"


def require(precision: str | None, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Raise ConfigError where `refuses` has a reason."""
    if precision is not None and (reason := refuses(precision, device, dtype)):
        raise ConfigError(f"precision {precision}: {reason}")


def expect_quantized(network: nn.Module, stored: Container[str], precision: str | None) -> set[str]:
    """Put quantized layers on the meta device where a saved program of `precision` has them in its tensors, `stored`.

    Returns the names of their tensors, which are read in the dtype they are stored in.
    """
    as_saved = set()
    for name, layer in list(linear_layers(network)):
        if f"{name}.{SCALE}" in stored:
            if precision is None:
                raise CheckpointError(f"{name} is quantized in a program of no precision; save it again")
            replace_module(network, name, converted(layer, precision))
            as_saved |= {f"{name}.weight", f"{name}.{SCALE}"}
    return as_saved


def check_quantized(network: nn.Module, device: torch.device, dtype: torch.dtype, precision: str | None) -> None:
    """Raise CheckpointError for weights of a loaded program that `device` cannot multiply."""
    found = [m for m in network.modules() if isinstance(m, QuantizedLinear)]
    if precision is None or not found:
        return
    if reason := refuses(precision, device, dtype):
        raise CheckpointError(f"this artifact holds {precision} weights: {reason}")
    multiple = _multiple(precision, device)
    if any(n % multiple for m in found for n in m.weight.shape):
        raise CheckpointError(
            f"this artifact holds {precision} weights whose inputs or outputs are no multiple of "
            f"{multiple}, as {device} needs; compile from the model folder for it"
        )
    if wrong := {m.weight.dtype for m in found} - {WEIGHT_DTYPES[precision]}:
        raise CheckpointError(f"this artifact of precision {precision} holds weights of {wrong.pop()}; save it again")
    limit = largest_int8(device)
    if precision == "int8" and limit < 127 and any(m.weight.abs().max() > limit for m in found):
        raise CheckpointError(
            "this artifact's int8 weights need a CPU with VNNI, where products do not saturate; "
            "compile from the model folder on this machine"
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
        return layer.kind, _how(layer.kind, device) if precision == layer.kind else "as saved"
    if min(layer.weight.shape) < NARROWEST or any(part in name for part in MODULATION):
        return "plain", "narrow, or a modulation of one row"
    why = "laid out once, not per call"
    if precision is not None:
        if any(part in name or part in group_of(name) for part in skip_layers):
            why = f"sensitive: kept out of {precision}"
        elif not in_block(network, name):
            why = f"embedder, projection or once per prompt: kept out of {precision}"
        elif any(n % (multiple := _multiple(precision, device)) for n in layer.weight.shape):
            why = f"inputs or outputs are no multiple of {multiple}: kept out of {precision}"
        else:
            return precision, _how(precision, device)
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


def _multiple(precision: str, device: torch.device) -> int:
    """Return what a layer's inputs and outputs must be multiples of: on a GPU; for fp8 everywhere, because a CPU merely
    tries it out."""
    return MULTIPLES[precision] if precision == "fp8" or device.type != "cpu" else 1


def _how(precision: str, device: torch.device) -> str:
    """Return a word on the products of a quantized layer."""
    if precision == "fp8":
        emulated = "emulated in float32, slowly: a CPU has no float8 products"
        return emulated if device.type == "cpu" else "e4m3, rows of activations and weights scaled"
    return "rows of activations and weights scaled" if largest_int8(device) == 127 else "7-bit weights: no VNNI"
