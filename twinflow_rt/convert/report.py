"""What a conversion did, or would do, key by key."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..single_files.recognition import PartReport


@dataclass(frozen=True)
class Conversion:
    """Everything a conversion did or would do. copied: folders and files taken from the base."""

    base: str
    target: str
    parts: tuple[PartReport, ...]
    copied: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, every key with its action."""
        parts = [
            {**asdict(p), "keys": [{"source": k.source, "action": k.action, "targets": k.targets} for k in p.keys]}
            for p in self.parts
        ]
        return {"base": self.base, "target": self.target, "parts": parts, "copied": list(self.copied)}

    def __str__(self) -> str:
        return "\n".join([*map(str, self.parts), f"from {self.base}: {', '.join(self.copied)}"])

    def require_complete(self) -> None:
        """Raises CheckpointError if a key is unknown or missing."""
        for part in self.parts:
            part.require_complete()
