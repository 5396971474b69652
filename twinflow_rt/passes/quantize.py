"""Pack and quantize: what each linear layer of a compiled network multiplies with.

    plain     torch's own `F.linear`
    packed    CPU: the weight in oneDNN's blocked layout, made once instead of in every call
    upcast    CPU without bfloat16 instructions: bfloat16 weights multiplied in float32
    int8      CPU: int8 weights with a scale per row, activations quantized per row as they come

Modules are exchanged in place, so models know nothing of it. A packed or quantized layer is still an
`nn.Linear` with a `weight` of its dtype, device and size; `state_dict` has it as it was loaded
(packed) or in the form `expect_int8` makes room for (int8).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import has_native
from ..errors import CheckpointError, ConfigError
from ..ops.linear import int8_limit, linear_int8, linear_packed, linear_upcast, pack, quantize_weight
from ..plan import Layers
from ..report import TRIM_EVERY, release_free_memory

SCALE = "weight_scale"  # beside an int8 weight in a saved program
MODULATION = ("norm", "text_embedder")  # layers of one row per prompt, computed in float32 from a plain weight
NARROWEST = 32  # layers of fewer inputs or outputs stay as they are: nothing to gain
PACKED_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Linear):
    """A linear layer whose weight is in oneDNN's layout."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_packed(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.detach().to_dense()


class UpcastLinear(nn.Linear):
    """A linear layer that stores bfloat16 and multiplies float32."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_upcast(x, self.weight, self.bias)


class Int8Linear(nn.Linear):
    """A linear layer with an int8 weight [N, K] and its float32 scales [N, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_int8(x, self.weight, self.weight_scale, self.bias)


def convert(
    network: nn.Module, device: torch.device, precision: str | None = None, exempt: Sequence[str] = ()
) -> tuple[Layers, ...]:
    """Exchanges the linear layers of a loaded `network` and says what each became.

    precision: "int8" quantizes the layers of its repeated blocks, but for `exempt` (parts of names, with
    or without block numbers: what measured sensitive) and what runs once per prompt. Other layers are
    packed where the CPU can.
    One weight at a time exists twice. Raises ConfigError where the device has no int8 products.
    """
    if precision == "int8" and (reason := int8_refuses(device)):
        raise ConfigError(f"precision int8: {reason}")
    limit = int8_limit(torch.cpu.get_capabilities())
    done: dict[tuple[str, str], list[int]] = {}
    freed = 0
    for name, layer in list(_linears(network)):
        kind, why = _kind(network, name, layer, device, precision, exempt)
        done.setdefault((kind, why), []).append(layer.weight.numel())
        freed += layer.weight.nbytes
        _exchange(layer, kind, limit)
        if freed > TRIM_EVERY:  # or the C library keeps the place of every old weight
            freed = 0
            release_free_memory()
    return tuple(Layers(kind, len(sizes), sum(sizes), why) for (kind, why), sizes in done.items())


def group_of(name: str) -> str:
    """A layer's name without the numbers of blocks: what its like in other blocks is called, too."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def groups(network: nn.Module) -> dict[str, list[nn.Linear]]:
    """The layers that precision "int8" would quantize in `network` (loaded, not yet int8), by kind."""
    found: dict[str, list[nn.Linear]] = {}
    for name, layer in _linears(network):
        if _kind(network, name, layer, torch.device("cpu"), "int8", ())[0] == "int8":
            found.setdefault(group_of(name), []).append(layer)
    return found


@contextmanager
def quantized(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """These layers in int8 for as long as it is entered; both forms are held meanwhile."""
    kept = [(layer, type(layer), layer.weight) for layer in layers]
    limit = int8_limit(torch.cpu.get_capabilities())
    for layer in layers:
        weight = layer.weight.detach()
        _become_int8(layer, *quantize_weight(weight.to_dense() if weight.is_mkldnn else weight, limit))
    try:
        yield
    finally:
        for layer, kind, weight in kept:
            layer.__class__, layer.weight = kind, weight
            del layer._parameters[SCALE]


def unpack(network: nn.Module) -> None:
    """Gives packed layers their plain weights back: for tracers, which cannot see into oneDNN's layout."""
    for _, layer in list(_linears(network)):
        if isinstance(layer, PackedLinear):
            layer.__class__, weight = nn.Linear, layer.weight.detach().to_dense()
            layer.weight = nn.Parameter(weight, requires_grad=False)


def int8_refuses(device: torch.device) -> str | None:
    """Why linear layers cannot multiply int8 on `device`, or None."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device}; leave precision out there"
    return None if torch.backends.mkldnn.is_available() else "needs a torch built with oneDNN"


def packing_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights of `dtype` cannot be packed for `device`, or None."""
    if device.type != "cpu":
        return f"oneDNN's layout is the CPU's, not {device.type}'s"
    if dtype not in PACKED_DTYPES:
        return f"oneDNN packs float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None if torch.backends.mkldnn.is_available() else "this torch is built without oneDNN"


def expect_int8(network: nn.Module, stored: Container[str]) -> set[str]:
    """Makes room, on the meta device, for the int8 layers of a saved program that has the tensors `stored`.
    Returns the names of their tensors, which are read in the dtype they are stored in."""
    as_saved = set()
    for name, layer in list(_linears(network)):
        if f"{name}.{SCALE}" in stored:
            scales = torch.empty(layer.out_features, 1, device="meta")
            _become_int8(layer, torch.empty_like(layer.weight, dtype=torch.int8), scales)
            as_saved |= {f"{name}.weight", f"{name}.{SCALE}"}
    return as_saved


def check_int8(network: nn.Module, device: torch.device) -> None:
    """Refuses, with a CheckpointError, int8 weights of a loaded program that `device` cannot multiply."""
    quantized = [m for m in network.modules() if isinstance(m, Int8Linear)]
    if quantized and (reason := int8_refuses(device)):
        raise CheckpointError(f"this artifact holds int8 weights: {reason}")
    limit = int8_limit(torch.cpu.get_capabilities())
    if limit < 127 and any(m.weight.abs().max() > limit for m in quantized):
        raise CheckpointError(
            "this artifact's int8 weights need a CPU with VNNI, where products do not saturate; "
            "compile from the model folder on this machine"
        )


def converted(stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """A sentence for the plan where weights are held in another dtype than the checkpoint's because of `device`."""
    if stored == dtype or has_native(stored, device):
        return ()
    kept, held = (str(d).removeprefix("torch.") for d in (stored, dtype))
    return (f"stored in {kept}, which this {device.type} only emulates: weights converted to {held} at load",)


def _linears(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear))


def _kind(
    network: nn.Module, name: str, layer: nn.Linear, device: torch.device, precision: str | None, exempt: Sequence[str]
) -> tuple[str, str]:
    """What becomes of one layer, and the reason."""
    if isinstance(layer, Int8Linear):
        return "int8", "as saved"
    if min(layer.weight.shape) < NARROWEST or any(part in name for part in MODULATION):
        return "plain", "narrow, or a modulation of one row"
    if precision == "int8":
        if any(part in name or part in group_of(name) for part in exempt):
            why = "sensitive: kept out of int8"
        elif not _in_blocks(network, name):
            why = "embedder, projection or once per prompt: kept out of int8"
        else:
            limit = int8_limit(torch.cpu.get_capabilities())
            return "int8", "rows of activations and weights scaled" if limit == 127 else "7-bit weights: no VNNI"
    else:
        why = "laid out once, not per call"
    stored = layer.weight.dtype
    if reason := packing_refuses(device, stored):
        return "plain", reason
    if stored == torch.bfloat16 and not has_native(stored, device):
        return "upcast", "this CPU has no bfloat16 instructions (AVX512-BF16, AMX)"
    return "packed", why


def _in_blocks(network: nn.Module, name: str) -> bool:
    """Whether a layer belongs to a repeated block that runs per evaluation."""
    head = name.split(".")[0]
    return head not in getattr(network, "prompt_modules", ()) and isinstance(getattr(network, head), nn.ModuleList)


def _exchange(layer: nn.Linear, kind: str, limit: float) -> None:
    if kind == "packed":
        layer.__class__, weight = PackedLinear, pack(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
    elif kind == "upcast":
        layer.__class__ = UpcastLinear
    elif kind == "int8" and not isinstance(layer, Int8Linear):
        _become_int8(layer, *quantize_weight(layer.weight.detach(), limit))


def _become_int8(layer: nn.Linear, weight: Tensor, scales: Tensor) -> None:
    layer.__class__ = Int8Linear
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter(SCALE, nn.Parameter(scales, requires_grad=False))
