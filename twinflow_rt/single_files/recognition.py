"""Which networks files hold, and whether they are the base's, key by key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import PICKLES, WEIGHTS, is_folder, read_json, some
from ..checkpoint.layout import Layout, check
from ..checkpoint.names import CONTAINERS, WRAPPERS, Key
from ..checkpoint.tensor_files import INDEX, open_file
from ..errors import CheckpointError
from .networks import Converted, Slot

LISTED = 12  # keys of one kind that the printed report names


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


def open_files(base: Path, paths: Iterable[Path]) -> dict[str, Checkpoint]:
    """Return the networks in files, headers read, by the folders of `base` that they take the place of.

    paths: files of weights, or folders of them. Raises CheckpointError for files that are not this model's, or lack
    some of a network.
    """
    found = recognise(paths, base)
    for _, report in found:
        report.require_complete()
    return {network.slot.name: network.checkpoint() for network, _ in found}


def recognise(paths: Iterable[Path], base: Path) -> list[tuple[Converted, PartReport]]:
    """Return the networks of `base` that files hold, and what was found of each; one may come from several.

    Raises CheckpointError for a file that holds none of them, ConfigError for one that adds nothing.
    """
    index, folders = read_json(base / "model_index.json"), [path.parent for path in base.glob("*/config.json")]
    slots = [Slot(folder) for folder in sorted(folders) if index.get(folder.name) != [None, None]]
    networks: dict[str, Converted] = {}
    for source in _open_sources(paths):
        for slot, keys in _networks(source, slots):
            networks.setdefault(slot.name, Converted(slot)).add(source, keys)
    return [(network, _account(network, base)) for network in networks.values()]


def _open_sources(paths: Iterable[Path]) -> Iterator[Checkpoint]:
    """Open files as given; of a folder, every file in it and below; where an index or a config.json stands, those that
    loading would read."""
    for path in paths:
        chosen: Iterable[Path] = [path]
        if is_folder(path):
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in WEIGHTS)
            if not files:
                raise CheckpointError(f"{path} holds no .safetensors or .gguf file; give files of weights")
            names = {f.parent: {other.name for other in f.parent.iterdir()} for f in files}
            networks = {at for at, found in names.items() if "config.json" in found or any(map(INDEX.fullmatch, found))}
            chosen = (*sorted(networks), *(file for file in files if file.parent not in networks))
        elif path.suffix in PICKLES:
            raise CheckpointError(f"{path} is a pickle, which can run code when read; save it with safetensors first")
        for source in chosen:
            yield Checkpoint(source, files=None if is_folder(source) else [open_file(source)], config={})


def _networks(source: Checkpoint, slots: Sequence[Slot]) -> Iterator[tuple[Slot, list[Key]]]:
    """Yield the networks in a source, whole or in part. Keys in a container (`CONTAINERS`) belong to a network of that
    sort, the others to any; which one, the names decide."""
    groups: dict[tuple[str, str], dict[str, str]] = {}  # container -> key in the file -> key without it
    for stored in source:
        container, bare = _container(stored)
        groups.setdefault(container, {})[stored] = bare
    for (sort, _), group in groups.items():
        candidates = [s for s in slots if s.name.startswith(sort)]
        if not candidates:
            raise CheckpointError(f"{source.folder}: holds a {sort}, which the base has not")
        shapes = {bare: source.shape(stored) for stored, bare in group.items()}
        slot = max((s for s in candidates if s.known(shapes)), key=lambda s: s.likeness(shapes), default=None)
        if slot is None:
            raise CheckpointError(
                f"{source.folder}: {some(shapes)} belong to none of the base's networks "
                f"({', '.join(s.name for s in slots)}); is the base the same model? (adapters go with loras=)"
            )
        yield slot, [Key(stored, slot.rules.targets(b), slot.rules.swapped(b)) for stored, b in group.items()]


def _container(key: str) -> tuple[tuple[str, str], str]:
    """Return (sort of network, its name among those), and the key without its container; ("", "") if it has none."""
    key = re.sub(f"^{WRAPPERS}", "", key)
    for sort, pattern in CONTAINERS.items():
        if match := re.match(pattern, key):
            return (sort, match.groupdict().get("name") or ""), re.sub(f"^{WRAPPERS}", "", key[match.end() :])
    return ("", ""), key


def _account(network: Converted, base: Path) -> PartReport:
    """Compare names, shapes and dtypes with what the network declares; return what was found. The second embedder is
    not asked of an ordinary flow model."""
    slot, checkpoint = network.slot, network.checkpoint()
    found, expected = set(checkpoint), slot.expected
    missing, family = slot.wanted - found, slot.family
    spare = {name for name in missing if family is not None and name.startswith(family.network.second_embedder + ".")}
    if family is not None and spare and spare == missing and family.scheduler(base, checkpoint) is not None:
        expected, missing = {name: expected[name] for name in expected.keys() - spare}, set()
    unknown = {name for name in found - slot.wanted if not name.startswith(slot.layout.unused)}
    if not missing:
        check(expected, checkpoint, Layout(slot.layout.fused, (*slot.layout.unused, *unknown)))
    hint, keys = slot.layout.absent(missing) if missing else None, tuple(network.found)
    return PartReport(slot.name, str(checkpoint.folder), keys, tuple(sorted(unknown)), tuple(sorted(missing)), hint)
