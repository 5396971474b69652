"""A hub on this machine: one repository in folders, served with the addresses and headers of huggingface.co."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")


class Hub:
    """repo: "owner/name" of `folder`. lies: files whose bytes are not those the hub records. asked: paths of files
    that were fetched."""

    def __init__(self, repo: str, folder: Path) -> None:
        self.repo, self.folder, self.asked = repo, folder, []
        self.lies: set[str] = set()
        self.gated = False

    def files(self) -> Iterator[tuple[str, bytes]]:
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            yield str(path.relative_to(self.folder)), path.read_bytes()

    @staticmethod
    def oid(content: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

    def entry(self, name: str, content: bytes) -> dict:
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {
            "rfilename": name, "size": len(content), "blobId": self.oid(content),
    **({"lfs": lfs} if name.endswith(LARGE) else {})
        }  # fmt: skip

    def tree(self) -> list[dict]:
        entries = []
        for name, content in self.files():
            facts = self.entry(name, content)
            entry = {"type": "file", "oid": facts["blobId"], "size": facts["size"], "path": name}
            if lfs := facts.get("lfs"):
                entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 130}
            entries.append(entry)
        return entries


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            api, raw = f"/api/models/{hub.repo}", f"/{hub.repo}/resolve/"
            if not path.startswith((api, raw)):
                return self.answer(404, X_Error_Code="RepoNotFound")
            if hub.gated:
                return self.answer(403, X_Error_Code="GatedRepo")
            if "/no-such-revision" in path:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if path.startswith(api + "/tree/"):
                return self.answer(200, json.dumps(hub.tree()).encode(), Content_Type="application/json")
            if path.startswith(api):
                siblings = [hub.entry(name, content) for name, content in hub.files()]
                info = {"id": hub.repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            name = path.removeprefix(raw).partition("/")[2]
            content = dict(hub.files()).get(name)
            if content is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            if self.command == "GET":
                hub.asked.append(name)
            etag = hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else hub.oid(content)
            if name in hub.lies:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

        do_HEAD = do_GET

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address of `hub`, while it is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
