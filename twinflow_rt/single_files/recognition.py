"""Which networks files hold, and whether they are the base's, key by key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..checkpoint.files import some
from ..checkpoint.layout import Layout, check
from ..errors import CheckpointError
from .names import CONTAINERS, WRAPPERS
from .networks import Converted, Slot
from .report import Key, PartReport
from .sources import Source, open_sources


def open_files(base: Path, paths: Iterable[Path]) -> dict[str, Converted]:
    """Return the networks in files, by the folders of `base` that they take the place of.

    paths: files of weights, or folders of them. Headers are read, no weights. Raises CheckpointError for files that
    are not this model's, or lack some of a network.
    """
    found = recognise(open_sources(paths), find_slots(base))
    for _, report in found:
        report.require_complete()
    return {network.slot.name: network for network, _ in found}


def find_slots(base: Path) -> list[Slot]:
    """Return the networks of a model folder."""
    return [Slot(config.parent) for config in sorted(base.glob("*/config.json"))]


def recognise(sources: Iterable[Source], slots: Sequence[Slot]) -> list[tuple[Converted, PartReport]]:
    """Return the networks that sources hold, and what was found of each; one may come from several.

    Raises CheckpointError for a source that holds none of `slots`, ConfigError for one that adds nothing.
    """
    networks: dict[str, Converted] = {}
    for source in sources:
        for slot, keys in _networks(source, slots):
            networks.setdefault(slot.name, Converted(slot)).add(source, keys)
    return [(network, _account(network)) for network in networks.values()]


def _networks(source: Source, slots: Sequence[Slot]) -> Iterator[tuple[Slot, list[Key]]]:
    """Yield the networks in a source, whole or in part. Keys in a container (`CONTAINERS`) belong to a network of that
    sort, the others to any; which one, the names decide."""
    groups: dict[tuple[str, str], dict[str, str]] = {}  # container -> key in the file -> key without it
    for stored in source:
        container, bare = _container(stored)
        groups.setdefault(container, {})[stored] = bare
    for (sort, _), group in groups.items():
        candidates = [s for s in slots if s.name.startswith(sort)]
        if not candidates:
            raise CheckpointError(f"{source.path}: holds a {sort}, which the base has not")
        shapes = {bare: source.shape(stored) for stored, bare in group.items()}
        slot = max((s for s in candidates if s.known(shapes)), key=lambda s: s.likeness(shapes), default=None)
        if slot is None:
            raise CheckpointError(
                f"{source.path}: {some(shapes)} belong to none of the base's networks "
                f"({', '.join(s.name for s in slots)}); is the base the same model?"
            )
        yield slot, [Key(stored, slot.rules.targets(b), slot.rules.swapped(b)) for stored, b in group.items()]


def _container(key: str) -> tuple[tuple[str, str], str]:
    """Return (sort of network, its name among those), and the key without its container; ("", "") if it has none."""
    key = re.sub(f"^{WRAPPERS}", "", key)
    for sort, pattern in CONTAINERS.items():
        if match := re.match(pattern, key):
            return (sort, match.groupdict().get("name") or ""), re.sub(f"^{WRAPPERS}", "", key[match.end() :])
    return ("", ""), key


def _account(network: Converted) -> PartReport:
    """Compare names, shapes and dtypes with what the network declares; return what was found."""
    slot = network.slot
    found = set(network.names)
    missing = slot.wanted - found
    unknown = {name for name in found - slot.wanted if not name.startswith(slot.layout.unused)}
    if not missing:
        check(slot.expected, network, Layout(slot.layout.fused, (*slot.layout.unused, *unknown)))
    hint, keys = slot.layout.absent(missing) if missing else None, tuple(network.keys_found)
    return PartReport(slot.name, str(network.folder), keys, tuple(sorted(unknown)), tuple(sorted(missing)), hint)
