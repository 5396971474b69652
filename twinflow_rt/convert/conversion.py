"""The conversion itself: files are recognised, accounted for key by key, and written beside what the base has."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from ..checkpoint.atomic import check_target
from ..checkpoint.files import check_tree, is_folder, some
from ..checkpoint.layout import Layout, check
from ..errors import CheckpointError, ConfigError
from ..loading import model_path
from ..planning.description import describe
from ..runtime.host_state import isolated
from .files import Source, open_sources, write_folder
from .names import CONTAINERS, WRAPPERS
from .networks import Converted, Slot
from .report import Conversion, Key, PartReport


@isolated()
def convert(files: Sequence[Path], base: Path, target: Path, *, dry_run: bool = False) -> Conversion:
    """Write `target`, the model of `base` with the networks found in `files` in place of its own.

    files: safetensors files, or folders of them. base: a path, or another name of a model that `load` takes. dry_run:
    only say what would be written, keys unknown or missing included. Raises CheckpointError for files that are not this
    model's, ConfigError if `target` exists.
    """
    base = model_path(base)
    if not is_folder(base) or not (base / "model_index.json").is_file():
        raise CheckpointError(f"{base} is no model folder in diffusers' layout (it needs model_index.json)")
    check_tree(base)
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists; choose another name or remove it")
    check_target(target, "the folder to write", make_parents=True)
    slots = [Slot(p.parent) for p in sorted(base.glob("*/config.json"))]
    networks: dict[str, Converted] = {}
    reports: list[PartReport] = []
    for source in open_sources(files):
        for network, report in _recognise(source, slots):
            if network.slot.name in networks:
                raise ConfigError(f"{source.path}: a second {network.slot.name}; give each network once")
            networks[network.slot.name] = network
            reports.append(report)
    copied = [path for path in sorted(base.rglob("*")) if path.is_file() and _stays(path.relative_to(base), networks)]
    names = sorted({p.relative_to(base).parts[0] for p in copied})
    result = Conversion(str(base), str(target), tuple(reports), tuple(names))
    if dry_run:
        return result
    result.require_complete()
    # describe makes all the checks that loading makes, but for reading the weights
    write_folder(target, base, copied, networks, describe)
    return result


def _recognise(source: Source, slots: Sequence[Slot]) -> Iterator[tuple[Converted, PartReport]]:
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


def _stays(path: Path, replaced: Container[str]) -> bool:
    """Return whether a file of the base is taken: all but weights and indices of the networks that are replaced."""
    part = path.parts[0]
    return not part.startswith(".") and (part not in replaced or path.name == "config.json")
