"""What every request passes first: the token, the size of its body, and the counters."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from typing import Any

from starlette.responses import JSONResponse

log = logging.getLogger(__name__)
OPEN = ("/", "/health", "/health/live", "/health/ready")  # no token asked for
EDITS = "/v1/images/edits"
MAKING = ("/v1/images/generations", EDITS)
PATHS = (*OPEN, *MAKING, "/v1/models", "/metrics")  # named in the metrics
MAX_BODY = 1 << 18  # bytes
MAX_PICTURES = 1 << 25  # bytes of a body with pictures
MAX_READ = 16 * MAX_BODY  # of a body that is refused: who is cut off while sending may not see the answer
CLOSE = {"Connection": "close"}  # the body is not read


class Gate:
    """ASGI middleware. count: a counter by path and status; seconds: a histogram for generations. timeout: seconds that
    a body may take to arrive."""

    def __init__(self, app: Any, *, token: str | None, timeout: float, count: Any, seconds: Any) -> None:
        self.app, self.timeout, self.count, self.seconds = app, timeout, count, seconds
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, began = scope["path"], time.monotonic()
        label = path if path in PATHS else "other"
        head = scope["method"] == "HEAD"  # answered as GET is, without the body
        if head:
            scope = {**scope, "method": "GET"}

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.count.labels(label, str(message["status"])).inc()
                if label in MAKING:
                    self.seconds.observe(time.monotonic() - began)
            elif head:
                message = {**message, "body": b""}
            await send(message)

        headers, most = dict(scope["headers"]), MAX_PICTURES if path == EDITS else MAX_BODY
        refusal = self._refusal(scope, headers, most)
        if refusal is None and scope["method"] == "POST":
            try:
                body = await asyncio.wait_for(_read(receive, 0 if refusal else most), self.timeout)
            except TimeoutError:
                message = f"the body did not arrive within {self.timeout:g} seconds"
                body, refusal = b"", failure(408, message, code="timeout", headers=CLOSE)
            if body is None:
                return
            if max(len(body), int(headers.get(b"content-length", b"0"))) > most:
                refusal = refusal or _too_large(most)
            receive = _replay(body, receive)
        try:
            await (refusal or self.app)(scope, receive, counted)
        except Exception:  # a bug: nothing of an answer was sent yet, or the server cuts it off
            log.exception("answering %s failed", label)
            await failure(500, "the server failed", "server_error")(scope, receive, counted)

    def _refusal(self, scope: dict[str, Any], headers: dict[bytes, bytes], most: int) -> JSONResponse | None:
        """Return the answer to a request that goes no further."""
        if self.token is not None and scope["path"] not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
                message = "send this server's token as 'Authorization: Bearer <token>'"
                return failure(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            length = headers.get(b"content-length", b"0")  # a chunked body has none
            if not length.isdigit():
                return failure(400, "Content-Length must be a number of bytes", headers=CLOSE)
            if len(length) > 18 or int(length) > max(most, MAX_READ):
                return _too_large(most)
        return None


async def _read(receive: Any, most: int) -> bytes | None:
    """Return a request's body, of one beyond `most` bytes its beginning; None when the client has left."""
    body, size = bytearray(), 0
    while size <= max(most, MAX_READ):
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size += len(message.get("body", b""))
        if len(body) <= most:
            body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return bytes(body)


def _replay(body: bytes, receive: Any) -> Any:
    """Return a `receive` that gives a body already read, then what `receive` gives."""
    first = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replayed() -> Any:
        return next(first, None) or await receive()

    return replayed


def _too_large(most: int) -> JSONResponse:
    return failure(413, f"the body has more than {most} bytes", code="body_too_large", headers=CLOSE)


def failure(
    status: int, message: str, kind: str = "invalid_request_error", *, code: str | None = None,
    param: str | None = None, headers: dict[str, str] | None = None,
) -> JSONResponse:  # fmt: skip
    """Return an answer in OpenAI's shape of errors."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)
