"""Parameters of networks counted: their bytes, and how many of each kind."""

from __future__ import annotations

from torch import nn


def parameter_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def group_parameters(sizes: dict[str, int]) -> dict[str, int]:
    """Return the sums of parameters by what they were: layer numbers dropped from their names, norm weights
    together."""
    groups: dict[str, int] = {}
    for name, n in sizes.items():
        key = ".".join(part for part in name.split(".") if not part.isdigit() and part not in ("weight", "bias"))
        key = "norm weights" if "norm" in key.rpartition(".")[2] else key
        groups[key] = groups.get(key, 0) + n
    return groups
