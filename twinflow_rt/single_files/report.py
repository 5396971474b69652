"""What becomes of the tensors of a file, key by key."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.files import some
from ..errors import CheckpointError

LISTED = 12  # keys of one kind that the printed report names


@dataclass(frozen=True)
class Key:
    """What happens to one tensor of a file: its names afterwards, none if it is dropped; whether its row
    halves trade places."""

    source: str
    targets: tuple[str, ...]
    swapped: bool = False

    @property
    def action(self) -> str:
        if len(self.targets) != 1:
            return "split" if self.targets else "dropped"
        if self.swapped:
            return "swapped"
        return "kept" if self.targets[0] == self.source else "renamed"


@dataclass(frozen=True)
class PartReport:
    """One network from one file: every key, and what its names do not cover. hint: why keys are missing,
    where the network knows a reason."""

    part: str
    file: str
    keys: tuple[Key, ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    hint: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.part} from {self.file}: {len(self.keys)} keys"]
        for action in ("kept", "renamed", "swapped", "split", "dropped"):
            chosen = [k for k in self.keys if k.action == action]
            lines += [f"  {action:<8} {len(chosen):>6}"] if chosen else []
            shown = chosen if action == "dropped" else [] if action == "kept" else chosen[:LISTED]
            lines += [f"    {k.source} -> {', '.join(k.targets)}" if k.targets else f"    {k.source}" for k in shown]
            lines += [f"    and {len(chosen) - len(shown)} more"] if shown and len(chosen) > len(shown) else []
        for name, keys in (("unknown", self.unknown), ("missing", self.missing)):
            lines += [f"  {name:<8} {len(keys):>6}", *(f"    {k}" for k in keys)] if keys else []
        lines += [f"  {self.hint}"] if self.hint else []
        return "\n".join(lines)

    def require_complete(self) -> None:
        """Raise CheckpointError if a key is unknown or missing."""
        if self.unknown:
            raise CheckpointError(f"{self.file}: unknown {some(self.unknown)}; the base is another model, or a variant")
        if self.missing:
            reason = self.hint or f"{self.part} lacks {some(self.missing)}; another model, or an incomplete file"
            raise CheckpointError(f"{self.file}: {reason}")
