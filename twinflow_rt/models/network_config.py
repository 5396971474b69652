"""What the families' transformer/config.json have in common: reading, writing, and the second time embedder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self

from ..errors import ConfigError


class NetworkConfig:
    """Base of the families' config dataclasses: fields are config.json's keys, defaults the release's.

    class_name: diffusers' network class. unread: keys that files have and inference does not need.
    variants: keys that, where set, make another network; `variant_hint` says which.
    """

    class_name: ClassVar[str]
    unread: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[str, ...]] = ()
    variant_hint: ClassVar[str] = ""

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Builds from config.json's content; diffusers' bookkeeping keys (`_*`) are dropped. Raises
        ConfigError for keys that the family does not know."""
        if active := [k for k in cls.variants if raw.get(k)]:
            raise ConfigError(f"transformer/config.json sets {', '.join(active)}: {cls.variant_hint}")
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        skipped = {*known, *cls.variants, *cls.unread}
        if unknown := [k for k, v in raw.items() if k not in skipped and not k.startswith("_") and v is not None]:
            raise ConfigError(f"transformer/config.json has keys this family does not know: {unknown}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """config.json's content, loadable by diffusers' class of that name."""
        out = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}  # type: ignore[call-overload]
        return {"_class_name": self.class_name, **out}


def second_embedder(name: str, family: str, instead: str = "") -> Callable[[set[str]], str | None]:
    """For `Layout.absent`: explains missing keys that are all of TwinFlow's second time embedder `name`."""

    def absent(missing: set[str]) -> str | None:
        if any(not key.startswith(name + ".") for key in missing):
            return None
        return (
            f"{name} is missing: this is a plain {family} checkpoint, or a community loader saved it without "
            f"TwinFlow's second time embedder; get the original TwinFlow files{instead}"
        )

    return absent
