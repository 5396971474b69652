"""Models of the Hugging Face hub: hf://OWNER/NAME[@REVISION][/SUBFOLDER]; or /FILE, for the weights of a network.

Without `download` only the hub's local cache is looked into and no socket is opened. With it, the
revision (a branch, a tag or a commit; default main) is resolved to a commit, the files that loading
reads are fetched (JSON, safetensors, tokenizers; never a pickle, never code), and the content of
each is compared with the hash that the hub records for that commit. The hub's own client does the
transfers, so its cache, its token and its variables (HF_HOME, HF_ENDPOINT, HF_TOKEN) are the usual ones.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import CheckpointError, ConfigError
from .files import WEIGHTS

SCHEME = "hf:/"  # pathlib makes one slash of two
NAME = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@([^/@\s]+))?(?:/([^@\s]+?))?/?")
NETWORKS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae", "connector")
PARTS = rf"(?:{'|'.join(NETWORKS)}|tokenizer(?:_\d)?|scheduler)"
READ = re.compile(rf"(?:model_index\.json|artifact\.json|{PARTS}/[\w.-]+\.(?:json|safetensors|txt|jinja))")
WHOLE = re.compile(r"(?:diffusion_pytorch_model|model)(?:-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class Source:
    """A model of the hub. subfolder: "" or the path of the model folder in the repository, ending in /, or that of a
    file of weights."""

    repo: str
    revision: str
    subfolder: str

    @property
    def is_file(self) -> bool:
        return self.subfolder.endswith(WEIGHTS)

    @property
    def first(self) -> str:
        """The file without which there is no such model."""
        return self.subfolder if self.is_file else self.subfolder + "model_index.json"

    def __str__(self) -> str:
        return f"hf://{self.repo}@{self.revision}/{self.subfolder}".rstrip("/")[:200]


def folder(path: str | Path, download: bool = False, without: Collection[str] = ()) -> Path:
    """Return the local folder, or file, of `path`, which may be one already. download: fetch or complete a model of the
    hub; without: parts whose weights are not needed.

    Raises ConfigError for a malformed hf:// name, CheckpointError for what is not in the cache, not on the
    hub, not reachable, or damaged.
    """
    if not str(path).startswith(SCHEME):
        return Path(path)
    source = parse(str(path))
    return _fetch(source, without) if download else _cached(source)


def parse(name: str) -> Source:
    """Return the parts of an hf:// name. Raises ConfigError for another form."""
    match = NAME.fullmatch(name)
    folders = match[3].split("/") if match and match[3] else []
    if match is None or any(part in ("", ".", "..") for part in (*match[1].split("/"), *folders)):
        raise ConfigError(f"{name!r:.200} is no model of the hub; write hf://owner/name[@revision][/subfolder]")
    subfolder = "/".join(folders)
    return Source(match[1], match[2] or "main", subfolder + "/" * bool(folders and not subfolder.endswith(WEIGHTS)))


def needed(names: Iterable[str], subfolder: str = "", without: Collection[str] = ()) -> list[str]:
    """Return those of a repository's file names that loading reads. without: parts whose weights it does not.

    Where a network has weights under the usual names, its variants (fp16 and the like) are left out.
    """
    inner = [name.removeprefix(subfolder) for name in names if name.startswith(subfolder)]
    read = [name for name in inner if READ.fullmatch(name)]
    usual = {name.partition("/")[0] for name in read if WHOLE.fullmatch(name.rpartition("/")[2])}

    def wanted(name: str) -> bool:
        part, _, file = name.rpartition("/")
        weights = part not in without and (part not in usual or WHOLE.fullmatch(file) is not None)
        return weights or not file.endswith(".safetensors")

    return [subfolder + name for name in sorted(read) if wanted(name)]


def _client() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(f"hf:// needs huggingface_hub ({error}): pip install huggingface_hub") from None
    return huggingface_hub


def _cached(source: Source) -> Path:
    try:
        found = _client().try_to_load_from_cache(source.repo, source.first, revision=source.revision)
    except (ValueError, OSError) as error:  # the client's rules for names, or the system's
        raise ConfigError(f"{source} is no model of the hub ({error!s:.200}): check its name") from None
    if not isinstance(found, str):
        raise CheckpointError(
            f"{source} is not in the local cache; fetch it with load(..., download=True) or --download, or where there "
            f"is no network, copy a model folder here and give its path"
        )
    return Path(found) if source.is_file else Path(found).parent


def _fetch(source: Source, without: Collection[str]) -> Path:
    client = _client()
    if os.path.expanduser("~") == "~" and not {"HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"} & {*os.environ}:
        raise ConfigError(f"there is no home folder to keep {source} in: set HF_HOME to a folder that can be written")
    try:
        info = client.HfApi().model_info(source.repo, revision=source.revision, files_metadata=True)
    except Exception as error:  # the client's, and those of whatever it speaks HTTP with
        raise CheckpointError(_why(source, error)) from None
    files = {entry.rfilename: entry for entry in info.siblings or ()}
    names = [source.first] if source.is_file else needed(files, source.subfolder, without)
    if source.first not in files:
        name = Path(source.first).name
        raise CheckpointError(f"there is no {name} at {source}; give a model folder, or weights with base=")
    try:
        root = Path(client.snapshot_download(source.repo, revision=source.revision, allow_patterns=names))
    except Exception as error:
        raise CheckpointError(_why(source, error)) from None
    if root.name != info.sha:
        raise CheckpointError(f"{source} changed while it was fetched ({info.sha} became {root.name}); fetch it again")
    try:
        for name in names:
            _verify(root / name, files[name], source)
    except OSError as error:  # another process, to which it was damaged, has removed it
        raise CheckpointError(f"{source} cannot be compared with the hub ({error}); fetch it again") from None
    return root / source.subfolder


def _verify(path: Path, entry: Any, source: Source) -> None:
    """Raise CheckpointError, and remove the file, where its content is not what the hub has recorded: the SHA-256 of
    large files, git's name of the others."""
    size = path.stat().st_size
    if entry.lfs is not None:
        digest, recorded = hashlib.sha256(), entry.lfs.sha256
    else:
        digest, recorded = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), entry.blob_id
    with path.open("rb") as file:
        hashlib.file_digest(file, lambda: digest)  # which goes on from what it holds
    if digest.hexdigest() != recorded:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise CheckpointError(f"{source}: {path.name} is not what the hub records ({recorded}); fetch it again")


def _why(source: Source, error: Exception) -> str:
    """Return what went wrong with the hub, and what to do."""
    kind, first = type(error).__name__, (str(error).strip().splitlines() or [""])[0]
    remedy = {
        "GatedRepoError": "accept its terms on the hub and log in with `hf auth login`",
        "RepositoryNotFoundError": "check the name; if it is private, log in with `hf auth login`",
        "RevisionNotFoundError": "check the revision after the @",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: unset it, or leave out download",
    }.get(kind, "check the network, or leave out download where the model is in the cache")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space, or set HF_HOME to a folder that can be written"
    return f"{source} could not be fetched ({kind}: {first:.200}); {remedy}"
