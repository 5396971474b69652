"""One velocity network per model family.

A family is found by the `_class_name` of its transformer's config.json; its module is imported only
then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..errors import CheckpointError
from ..passes.load import Layout

FAMILIES = {"ZImageTransformer2DModel": "z_image"}


@dataclass(frozen=True)
class Family:
    """What the compile path needs to know: config class, network class, and how files are read."""

    name: str
    config: Any
    network: Callable[..., Any]
    layout: Layout


def family_of(config: dict[str, Any]) -> Family:
    """The family of a transformer's config.json content; raises CheckpointError for any other."""
    name = config.get("_class_name")
    if name not in FAMILIES:
        raise CheckpointError(
            f"transformer/config.json says _class_name {name!r}, which is none of the supported families: "
            + ", ".join(FAMILIES)
        )
    return import_module(f".{FAMILIES[name]}", __name__).FAMILY
