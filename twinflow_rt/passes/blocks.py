"""The repeated blocks of a network: they stream, and a precision is for their linear layers."""

from __future__ import annotations

from torch import nn


def block_names(network: nn.Module) -> list[str]:
    """Return the names of the repeated blocks of `network` in the order they run.

    They are the items of its lists of modules that have a `forward` of their own; what runs once per prompt is not.
    """
    found: list[str] = []
    for name, module in network.named_modules():
        inside = any(name.startswith(block + ".") for block in found)
        if isinstance(module, nn.ModuleList) and not inside and not runs_per_prompt(network, name):
            kinds = {type(item) for item in module}
            if kinds and all(_computes(kind) for kind in kinds):
                found += [f"{name}.{i}" for i in range(len(module))]
    return found


def _computes(kind: type[nn.Module]) -> bool:
    """Return whether modules of this class are called themselves, as containers are not."""
    return kind.forward is not nn.Module.forward


def runs_per_prompt(network: nn.Module, name: str) -> bool:
    """Return whether the module `name` of `network` runs once per prompt."""
    return any(f"{name}.".startswith(f"{head}.") for head in getattr(network, "prompt_modules", ()))


def in_block(network: nn.Module, name: str, of_prompt: bool = False) -> bool:
    """Return whether module `name` of `network` belongs to a repeated block and, unless `of_prompt`, does not run once
    per prompt."""
    if not of_prompt and runs_per_prompt(network, name):
        return False
    module = network
    for part in name.split("."):
        owner, module = module, module.get_submodule(part)
        if isinstance(owner, nn.ModuleList) and _computes(type(module)):
            return True
    return False


def parameters_of(network: nn.Module, block: str) -> list[str]:
    """Return the names of the parameters that stream with `block`: those of its linear layers and convolutions.

    What runs once per prompt stays. The rest is small, and some of it is read before the block runs.
    """
    return [
        f"{name}.{leaf}"
        for name, layer in network.get_submodule(block).named_modules(prefix=block)
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not runs_per_prompt(network, name)
        for leaf, _ in layer.named_parameters()
    ]


def token_tables(network: nn.Module) -> list[str]:
    """Return the names of a text encoder's parameters that have a row per token: a prompt reads a few of them."""
    tokens = getattr(getattr(network, "config", None), "vocab_size", None)
    layers = {f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    tables = {name: p for name, p in network.named_parameters() if p.ndim == 2 and name not in layers}
    return [name for name, p in tables.items() if len(p) == tokens]


def group_of(name: str) -> str:
    """Return a layer's name without the number of its block, so that its like in all blocks form one group."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return name if number is None else ".".join(parts[:number] + parts[number + 1 :])
