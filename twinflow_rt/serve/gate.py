"""What every request passes first: the token, the size of its body, and the counters."""

from __future__ import annotations

import hmac
import time
from typing import Any

from starlette.responses import JSONResponse

OPEN = ("/", "/health", "/health/live", "/health/ready")  # no token asked for
PATHS = (*OPEN, "/v1/images/generations", "/v1/models", "/metrics")  # named in the metrics
MAX_BODY = 1 << 18  # bytes
CLOSE = {"Connection": "close"}  # the body is not read


class Gate:
    """ASGI middleware. count: a counter by path and status; seconds: a histogram for generations."""

    def __init__(self, app: Any, *, token: str | None, count: Any, seconds: Any) -> None:
        self.app, self.count, self.seconds = app, count, seconds
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, began = scope["path"], time.monotonic()
        label = path if path in PATHS else "other"

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.count.labels(label, str(message["status"])).inc()
                if label == "/v1/images/generations":
                    self.seconds.observe(time.monotonic() - began)
            await send(message)

        await (self._refusal(scope, dict(scope["headers"])) or self.app)(scope, receive, counted)

    def _refusal(self, scope: dict[str, Any], headers: dict[bytes, bytes]) -> JSONResponse | None:
        """Return the answer to a request that goes no further."""
        if self.token is not None and scope["path"] not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
                message = "send this server's token as 'Authorization: Bearer <token>'"
                return failure(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                return failure(411, "send a Content-Length", code="length_required", headers=CLOSE)
            if len(length) > 18 or int(length) > MAX_BODY:
                message = f"the body has {length[:18].decode()} bytes or more; at most {MAX_BODY} are taken"
                return failure(413, message, code="body_too_large", headers=CLOSE)
        return None


def failure(
    status: int, message: str, kind: str = "invalid_request_error", *, code: str | None = None,
    param: str | None = None, headers: dict[str, str] | None = None,
) -> JSONResponse:  # fmt: skip
    """Return an answer in OpenAI's shape of errors."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)
