"""Which networks a file holds, and whether they are the base's, key by key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..checkpoint.files import some
from ..checkpoint.layout import Layout, check
from ..errors import CheckpointError
from .names import CONTAINERS, WRAPPERS
from .networks import Converted, Slot
from .report import Key, PartReport
from .sources import Source


def recognise(source: Source, slots: Sequence[Slot]) -> Iterator[tuple[Converted, PartReport]]:
    """Yield the networks in a source. Keys in a container (`CONTAINERS`) belong to a network of that sort, the
    others to any; which one, the names decide."""
    groups: dict[tuple[str, str], dict[str, str]] = {}  # container -> key in the file -> key without it
    for stored in source:
        container, bare = _container(stored)
        groups.setdefault(container, {})[stored] = bare
    for (sort, _), group in groups.items():
        candidates = [s for s in slots if s.name.startswith(sort)]
        if not candidates:
            raise CheckpointError(f"{source.path}: holds a {sort}, which the base has not")
        shapes = {bare: source.shape(stored) for stored, bare in group.items()}
        slot = max(candidates, key=lambda s: s.likeness(shapes))
        if not slot.known(shapes):
            raise CheckpointError(
                f"{source.path}: {some(shapes)} belong to none of the base's networks "
                f"({', '.join(s.name for s in slots)}); is the base the same model?"
            )
        keys = tuple(Key(stored, slot.rules.targets(b), slot.rules.swapped(b)) for stored, b in group.items())
        network = Converted(source, slot, keys)
        yield network, _account(network, keys)


def _container(key: str) -> tuple[tuple[str, str], str]:
    """Return (sort of network, its name among those), and the key without its container; ("", "") if it has none."""
    key = re.sub(f"^{WRAPPERS}", "", key)
    for sort, pattern in CONTAINERS.items():
        if match := re.match(pattern, key):
            return (sort, match.groupdict().get("name") or ""), re.sub(f"^{WRAPPERS}", "", key[match.end() :])
    return ("", ""), key


def _account(network: Converted, keys: tuple[Key, ...]) -> PartReport:
    """Compare names, shapes and dtypes with what the network declares; return what was found."""
    slot = network.slot
    found = set(network.names)
    missing = slot.wanted - found
    unknown = {name for name in found - slot.wanted if not name.startswith(slot.layout.unused)}
    if not missing:
        check(slot.expected, network, Layout(slot.layout.fused, (*slot.layout.unused, *unknown)))
    hint = slot.layout.absent(missing) if missing else None
    return PartReport(slot.name, str(network.folder), keys, tuple(sorted(unknown)), tuple(sorted(missing)), hint)
