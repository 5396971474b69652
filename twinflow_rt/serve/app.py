"""The HTTP side of an engine: OpenAI's images API, health, metrics, and a page to try prompts.

    POST /v1/images/generations    GET /v1/models    GET /health /health/live /health/ready
    POST /v1/images/edits          GET /metrics      GET /             GET /openapi.json

Errors have OpenAI's shape, {"error": {"message", "type", "param", "code"}}. Images come as base64
only: a server that hands out links would have to keep what it made.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import CancelledError, CheckpointError, ConfigError, StorageError, TwinFlowError
from .engine import DrainingError, Engine, Job, QueueFullError
from .gate import CLOSE, EDITS, Gate, failure
from .metrics import Metrics
from .requests import EditRequest, ImageRequest, read_edit

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {  # nothing is fetched from anywhere else, and no other site may frame or script it
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
QUALITY = 95  # of jpeg and webp, where a request says no other
CLIENT_LEFT = 499  # nobody reads this answer; the number is for the metrics


class NoSuchModel(Exception):
    """A request names another model than the one served."""


def create_app(engine: Engine, name: str, *, token: str | None = None, timeout: float = 120.0) -> FastAPI:
    """Return the application serving `engine` as model `name`.

    token: what clients must send as `Authorization: Bearer <token>`, except to the page and /health.
    timeout: seconds a request may take, waiting included, once its body is there, which may take as long.
    """
    app = FastAPI(title="twinflow_rt", version=__version__, docs_url=None, redoc_url=None)
    metrics, created = Metrics(engine), int(time.time())
    app.add_middleware(Gate, token=token, timeout=timeout, count=metrics.requests, seconds=metrics.seconds)
    _add_errors(app, name, timeout)

    @app.post("/v1/images/generations")
    async def generate(request: Request, body: ImageRequest) -> Response:
        return await answer(request, body, {})

    @app.post(EDITS)
    async def edit(request: Request) -> Response:
        most = 4 * engine.limits.max_pixels  # of what is made smaller
        kind, content = request.headers.get("content-type", ""), await request.body()
        body, files = await run_in_threadpool(read_edit, kind, content, most)
        return await answer(request, body, {**files, "strength": body.strength})

    async def answer(request: Request, body: ImageRequest, picture: dict[str, Any]) -> Response:
        if body.model not in (None, name):
            raise NoSuchModel(body.model)
        kind, quality = body.output_format or "png", body.output_compression
        if kind == "png" and quality not in (None, 100):
            message = "output_compression: png loses nothing; send output_format jpeg or webp with it"
            return failure(400, message, param="output_compression")
        width, height = map(int, body.size.split("x")) if body.size not in (None, "auto") else (None, None)
        count = 1 if body.n is None else body.n
        asked = {"width": width, "height": height, "seed": body.seed, "num_images": count, "nfe": body.nfe, **picture}
        asked |= {"guidance": body.guidance, "negative_prompt": body.negative_prompt}
        submit = partial(engine.submit, body.prompt, **asked)
        jobs = await run_in_threadpool(submit) if picture else submit()
        try:
            images = await _finished(engine, jobs, request, timeout)
        except (TwinFlowError, TimeoutError):
            raise
        except Exception:  # a bug somewhere below, which the engine has logged
            return failure(500, "generation failed", "server_error")
        if images is None:
            return Response(status_code=CLIENT_LEFT)
        encoded = await run_in_threadpool(lambda: [encode(image, kind, quality) for image in images])
        data = [
            {"b64_json": image, "seed": job.seed, "truncated": job.truncated}
            for image, job in zip(encoded, jobs, strict=True)
        ]
        size = f"{images[0].width}x{images[0].height}"
        return JSONResponse({"created": int(time.time()), "data": data, "output_format": kind, "size": size})

    model = {"id": name, "object": "model", "created": created, "owned_by": "twinflow_rt"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        if wanted != name:
            raise NoSuchModel(wanted)
        return model

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        accepting = engine.accepting
        state = {"status": "ready" if accepting else "draining", "waiting": engine.waiting, "running": engine.running}
        return JSONResponse(state, 200 if accepting else 503)

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, headers=PAGE_HEADERS)

    return app


def encode(image: Any, kind: str, quality: int | None = None) -> str:
    """Return a PIL image as base64 of a file of `kind`. quality: 0 to 100, of jpeg and webp."""
    file = io.BytesIO()
    options = {"compress_level": 1} if kind == "png" else {"quality": QUALITY if quality is None else quality}
    image.save(file, format=kind.upper(), **options)
    return base64.b64encode(file.getvalue()).decode()


async def _finished(engine: Engine, jobs: list[Job], request: Request, timeout: float) -> list[Any] | None:
    """Return the jobs' images; None when the client has left. Whatever ends this early gives the jobs up.

    Raises TimeoutError, and what the jobs raise.
    """
    work = asyncio.create_task(_images(jobs))
    gone = asyncio.create_task(_disconnected(request))
    try:
        ends: tuple[asyncio.Task[Any], ...] = work, gone
        await asyncio.wait(ends, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            return None
        raise TimeoutError
    finally:
        work.cancel()
        gone.cancel()
        engine.cancel(jobs)


async def _images(jobs: list[Job]) -> list[Any]:
    return [await asyncio.wrap_future(job.future) for job in jobs]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -- errors ---------------------------------------------------------------------------------------


def _add_errors(app: FastAPI, name: str, timeout: float) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return failure(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
        if len(first["loc"]) < 2:
            return failure(400, "the body must be a JSON object, sent as application/json")
        asked = EditRequest if request.url.path == EDITS else ImageRequest
        param, fields = str(first["loc"][1]), asked.model_fields
        if first["type"] == "extra_forbidden":
            return failure(400, f"{param}: there is no such field; there are {', '.join(fields)}", param=param)
        why = fields[param].description
        return failure(400, f"{param}: {first['msg']}{f' ({why})' if why else ''}", param=param)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(NoSuchModel)
    async def unknown(request: Request, error: NoSuchModel) -> JSONResponse:
        return failure(404, f"model {str(error)!r} does not exist; this server has {name!r}", code="model_not_found")

    @app.exception_handler(TimeoutError)
    async def late(request: Request, error: TimeoutError) -> JSONResponse:
        message = f"no answer within {timeout:g} seconds; ask for fewer images, or later"
        return failure(504, message, "server_error", code="timeout")

    @app.exception_handler(TwinFlowError)
    async def failed(request: Request, error: TwinFlowError) -> JSONResponse:
        if isinstance(error, ConfigError):
            return failure(400, str(error))
        if isinstance(error, QueueFullError):
            headers = {"Retry-After": str(error.retry_after)}
            return failure(429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers=headers)
        if isinstance(error, (DrainingError, CancelledError)):
            headers = {"Retry-After": "1", **CLOSE}
            return failure(503, str(error), "server_error", code="unavailable", headers=headers)
        told = not isinstance(error, (CheckpointError, StorageError))  # those name files
        return failure(500, str(error) if told else "generation failed", "server_error")
