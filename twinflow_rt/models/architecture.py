"""Architectures: what the files of a network are read with, declared beside the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import Layout
from .config import check_fields, reading
from .meta_device import meta_device


@dataclass(frozen=True)
class Architecture:
    """A kind of network, and how its files are read.

    config: dataclass with `from_dict(content of config.json)`. network(config): builds it. layout(config): which
    tensors are merged, unused, or kept in another dtype. strip: prefixes that files may put before every name.
    read: the class that opens a folder of it. encoder: of an autoencoder's decoder, the other half in the same files.
    """

    config: Any
    network: Callable[[Any], Any]  # an nn.Module with `config` and `ops`
    layout: Callable[[Any], Layout]
    strip: tuple[str, ...] = ()
    read: type[Checkpoint] = Checkpoint
    encoder: Architecture | None = None

    def declare(self, raw: dict[str, Any], where: str = "config.json") -> tuple[nn.Module, Layout]:
        """Return the network that config.json's content asks for, on the meta device, and how its files are read.

        where: what an error message calls the file. Raises ConfigError.
        """
        with reading(where), meta_device():
            config = self.config.from_dict(raw)
            check_fields(type(config), vars(config), where)
            return self.network(config), self.layout(config)
