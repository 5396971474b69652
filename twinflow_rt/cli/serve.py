"""`twinflow-rt serve`: binds, loads, warms up, serves, and drains when told to stop."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import ConfigError
from ..serve.engine import Engine, Limits
from .options import add_batch_invariant

log = logging.getLogger(__name__)
MAX_SECONDS = 1_000_000  # that threads can wait
LOADING = ("device", "dtype", "precision", "nfe", "download", "batch_invariant")  # arguments of `load`
LOOPBACK = ("127.0.0.1", "::1", "localhost")
OPTIONS = {
    "max_batch": "images of one run",
    "max_wait": "seconds an image waits for others to run beside it",
    "max_queue": "images waiting before requests are refused with 429",
    "max_images": "images of one request",
    "max_pixels": "width x height of one image",
    "max_prompt": "characters of a prompt",
    "max_nfe": "network evaluations per image that a request may ask for",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="demo", help="model folder, hf://owner/name, or 'demo' (default)")
    parser.add_argument("--download", action="store_true", help="fetch a model hf://owner/name[@revision][/subfolder]")
    parser.add_argument("--name", help="the model's name in the API; default: the folder's")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: fits model and device")
    parser.add_argument("--precision", help="fp32, fp16, bf16, int8 (CPU), fp8 (GPU) or auto; default: what fits")
    add_batch_invariant(parser)
    parser.add_argument("--nfe", type=int, help="network evaluations per image where a request names none; default: 1")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default %(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    token = parser.add_mutually_exclusive_group()
    token.add_argument("--token-file", type=Path, metavar="FILE", help="file with the bearer token clients must send")
    token.add_argument("--token-env", metavar="NAME", help="environment variable with that token")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a request may take (default %(default)s)")
    parser.add_argument(
        "--drain-timeout", type=float, default=30.0, metavar="SECONDS",
        help="after SIGTERM, time to finish what was accepted (default %(default)s)",
    )  # fmt: skip
    add_ray_arguments(parser)
    for limit in fields(Limits):
        kind = float if isinstance(limit.default, float) else int
        name = "--" + limit.name.replace("_", "-")
        parser.add_argument(name, type=kind, default=limit.default, help=f"{OPTIONS[limit.name]} (default %(default)s)")


def add_ray_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the work goes to a Ray cluster, and how much of one it takes."""
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS",
        help="one worker per GPU of a Ray cluster; default: the one running here, else a new one on this machine",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, help="with --ray, at most; default: GPUs, or nodes where there is none")
    parser.add_argument("--min-workers", type=int, default=1, help="with --ray, at least (default %(default)s)")
    parser.add_argument("--worker-cpus", type=float, help="with --ray, cores of a worker; default: 1, or a node's")


def run(args: argparse.Namespace, load: Callable[[], Any]) -> int:
    """Serves until SIGTERM or SIGINT; returns 0 when everything accepted was finished, else 1.

    load() -> the pipeline. Raises what it raises, ConfigError for options, OSError for the address.
    """
    try:
        from ..serve.app import create_app
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'twinflow-rt[serve]'") from None
    token = read_token(args.token_file, args.token_env)
    for option in ("timeout", "drain_timeout"):
        if not 0 < getattr(args, option) <= MAX_SECONDS:
            raise ConfigError(f"--{option.replace('_', '-')} must be more than 0 seconds, and at most {MAX_SECONDS:,}")
    limits = limits_of(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # bound before the model is loaded: a taken port must not cost minutes
    with bind(args.host, args.port) as listener, open_engine(args, limits, load) as engine:
        warm_up(engine)
        if token is None and args.host not in LOOPBACK:
            log.warning("serving on %s without a token: whoever reaches this address can generate images", args.host)
        name = args.name or model_name(args.model)
        app = create_app(engine, name, token=token, timeout=args.timeout)
        listener.listen()
        host, port = listener.getsockname()[:2]
        log.info("serving %s on http://%s:%d", name, f"[{host}]" if ":" in host else host, port)
        return serve(app, engine, listener, args.drain_timeout)


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits among the options. Raises ConfigError."""
    return Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})


def model_name(model: str) -> str:
    """A model's name without the folder it is in."""
    return "demo" if model == "demo" else Path(model).resolve().name


def open_engine(args: argparse.Namespace, limits: Limits, load: Callable[[], Any]) -> AbstractContextManager[Engine]:
    """The engine in this process, or with --ray the front of a cluster's."""
    if args.ray is None:
        return nullcontext(Engine(load(), limits))
    try:
        from ..serve.ray import open_cluster
    except ModuleNotFoundError as error:
        raise ConfigError(f"--ray needs {error.name}: pip install 'twinflow-rt[ray]'") from None
    return open_cluster(args, limits)


def read_token(file: Path | None, variable: str | None) -> str | None:
    """The token from a file or an environment variable (an option would show in the process list)."""
    if file is not None:
        try:
            token, where = file.read_text(encoding="utf-8").strip(), f"--token-file {file}"
        except (OSError, ValueError) as error:
            raise ConfigError(f"--token-file {file} is not readable ({error}); name a file with the token") from None
    elif variable is not None:
        token, where = os.environ.get(variable, "").strip(), f"--token-env {variable}"
    else:
        return None
    if not token:
        raise ConfigError(f"{where} holds no token; put one there, for example from `openssl rand -hex 32`")
    return token


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket, not yet listening."""
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


def warm_up(engine: Engine) -> None:
    """One image of the default size, so that the first caller does not pay for first uses."""
    (job,) = engine.submit("warm-up", seed=0)
    job.future.result()


def serve(app: Any, engine: Engine, listener: socket.socket, drain_timeout: float) -> int:
    """Runs the server. The first SIGTERM or SIGINT drains: new requests get 503 and what was accepted
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
