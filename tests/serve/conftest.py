"""Servers on loopback ports."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from tests.serve.fake import FakePipe
from twinflow_rt.serve.app import create_app
from twinflow_rt.serve.engine import Engine
from twinflow_rt.serve.settings import Limits

PATIENCE = 60  # seconds; tests of waiting wait far less


def eventually(condition, what: str = "condition"):
    """Waits for it; an assertion that it came."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not come about"
        time.sleep(0.01)


@contextmanager
def served(pipe, *, limits: Limits | None = None, change=lambda app: None, **options):
    """A real server around `pipe`; yields an HTTP client of it, with the engine as `.engine`."""
    engine = Engine(pipe, limits)
    app = create_app(engine, "tiny", **options)
    change(app)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=PATIENCE) as client:
            client.engine = engine
            yield client
    finally:
        server.should_exit = True
        engine.drain(0.5)
        thread.join(PATIENCE)
        listener.close()


@pytest.fixture
def pipe():
    return FakePipe()


@pytest.fixture
def start(pipe):
    """Starts servers around the fake pipe."""
    open_servers = []

    def make(change=lambda app: None, token=None, timeout=PATIENCE, **limits):
        server = served(pipe, limits=Limits(**{"max_wait": 0.0, **limits}), change=change, token=token, timeout=timeout)
        open_servers.append(server)
        return server.__enter__()

    yield make
    pipe.gate.set()
    for server in open_servers:
        server.__exit__(None, None, None)
