"""Modules are exchanged by setting another one on their parent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `network` has the module `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


def take_over(new: nn.Module, old: nn.Module, weight: Tensor) -> None:
    """Give a `new` layer, which was made on the meta device, this weight (frozen) and the bias of the `old` one."""
    new.weight, new.bias = nn.Parameter(weight, requires_grad=False), old.bias
    new.train(old.training)


@contextmanager
def replaced(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `modules` into `network` under their names; the ones that were there come back at the end.

        with replaced(network, quantized_layers(group, "fp8")):
            network(...)
    """
    before = {name: network.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            replace_module(network, name, module)
        yield
    finally:
        for name, module in before.items():
            replace_module(network, name, module)
