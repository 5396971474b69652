"""The server as a process: binds, loads, warms up, serves, and drains when told to stop."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

from ..errors import ConfigError, PromptTruncatedWarning, extra_missing
from .app import create_app
from .engine import Engine
from .settings import Settings

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def run(settings: Settings, load: Callable[[], Any]) -> int:
    """Serve until SIGTERM or SIGINT; return 0 when everything accepted was finished, else 1.

    load() -> the pipeline. Raises what it raises, ConfigError for options, OSError for the address.
    """
    server, token = settings.server, settings.server.token()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    warnings.simplefilter("ignore", PromptTruncatedWarning)  # answers say it
    # bound before the model is loaded: a taken port must not cost minutes
    with bind(server.host, server.port) as listener, open_engine(settings, load) as engine:
        engine.warm_up()
        if token is None and server.host not in LOOPBACK:
            log.warning("serving on %s without a token: whoever reaches this address can generate images", server.host)
        app = create_app(engine, settings.name, token=token, timeout=server.timeout)
        listener.listen()
        host, port = listener.getsockname()[:2]
        log.info("serving %s on http://%s:%d", settings.name, f"[{host}]" if ":" in host else host, port)
        return _serve(app, engine, listener, server.drain_timeout)


def open_engine(settings: Settings, load: Callable[[], Any]) -> AbstractContextManager[Engine]:
    """Return the engine in this process, or with --ray the front of a cluster's."""
    if settings.ray.ray is None:
        return nullcontext(Engine(load(), settings.limits))
    try:
        from .ray import open_cluster
    except ModuleNotFoundError as error:
        raise extra_missing(f"--ray needs {error.name}", "ray") from None
    return open_cluster(settings)


def bind(host: str, port: int) -> socket.socket:
    """Return a bound TCP socket, not yet listening."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port} must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--host {host!r:.100} is no address ({error}); use 127.0.0.1 or 0.0.0.0") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot bind {host}:{port}: {error.strerror}; choose another --port or --host") from None
    return listener


def _serve(app: Any, engine: Engine, listener: socket.socket, drain_timeout: float) -> int:
    """Run the server. The first SIGTERM or SIGINT drains: new requests get 503 and what was accepted
    is answered; a second one, or `drain_timeout` seconds, ends that."""
    import uvicorn

    class Server(uvicorn.Server):
        drained = True

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if engine.accepting:
                log.info("%s: finishing %d images", signal.Signals(sig).name, engine.waiting + engine.running)
                threading.Thread(target=self.drain, daemon=True).start()
            else:
                self.drained, self.should_exit, self.force_exit = False, True, True

        def drain(self) -> None:
            self.drained = engine.drain(drain_timeout)
            self.should_exit = True

    config = uvicorn.Config(app, lifespan="off", server_header=False, log_config=None, timeout_graceful_shutdown=5)
    server = Server(config)
    server.run(sockets=[listener])
    return 0 if server.drained else 1
