"""What a server is asked for: dataclasses that the command line, Ray's config files and the server itself read.

Imports nothing heavy, so that `twinflow-rt serve --help` is quick.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..options import LoadOptions, about, add_arguments, check_fields, read_arguments

MAX_SECONDS = 1_000_000  # that threads can wait
LOAD_SKIPS = ("preview",)  # options of `load` that no request could use
TOKEN = ("token_file", "token_env")


@dataclass(frozen=True)
class Limits:
    """What the engine takes on. max_wait is that of the oldest image; max_images, max_pixels, max_prompt and max_nfe
    bound one request. Raises ConfigError for values that cannot work."""

    max_batch: int = field(default=8, metadata=about("images of one run"))
    max_wait: float = field(default=0.01, metadata=about("seconds an image waits for others to run beside it"))
    max_queue: int = field(default=64, metadata=about("images waiting before requests are refused with 429"))
    max_images: int = field(default=10, metadata=about("images of one request"))
    max_pixels: int = field(default=2048 * 2048, metadata=about("width x height of one image"))
    max_prompt: int = field(default=4000, metadata=about("characters of a prompt"))
    max_nfe: int = field(default=8, metadata=about("network evaluations per image that a request may ask for"))

    def __post_init__(self) -> None:
        from ..config import check_count, shown

        check_fields(self)
        for name in ("max_batch", "max_queue", "max_images", "max_pixels", "max_prompt", "max_nfe"):
            check_count(name, getattr(self, name))
        if self.max_wait < 0:
            raise ConfigError(f"max_wait must be seconds, 0 or more; got {self.max_wait:g}")
        if self.max_images > self.max_queue:
            most = shown(self.max_images)
            raise ConfigError(f"max_queue {self.max_queue} must hold one request of max_images {most}")


@dataclass(frozen=True)
class ServerOptions:
    """The HTTP side. Raises ConfigError for values that cannot work."""

    name: str | None = field(default=None, metadata=about("the model's name in the API", "the folder's"))
    host: str = field(default="127.0.0.1", metadata=about("address to bind", "127.0.0.1: this machine only"))
    port: int = field(default=8000, metadata=about("0 takes a free one"))
    token_file: Path | None = field(
        default=None, metadata=about("file with the bearer token clients must send", metavar="FILE")
    )
    token_env: str | None = field(default=None, metadata=about("environment variable with that token", metavar="NAME"))
    timeout: float = field(default=120.0, metadata=about("seconds a request may take"))
    drain_timeout: float = field(
        default=30.0, metadata=about("after SIGTERM, time to finish what was accepted", metavar="SECONDS")
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("timeout", "drain_timeout"):
            if not 0 < getattr(self, name) <= MAX_SECONDS:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} must be more than 0 seconds, and at most {MAX_SECONDS:,}")

    def token(self) -> str | None:
        """Return the token, from a file or an environment variable (an option would show in the process list)."""
        if self.token_file is not None:
            where = f"--token-file {self.token_file}"
            try:
                token = self.token_file.read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                raise ConfigError(f"{where} is not readable ({error}); name a file with the token") from None
        elif self.token_env is not None:
            token, where = os.environ.get(self.token_env, "").strip(), f"--token-env {self.token_env}"
        else:
            return None
        if not token:
            raise ConfigError(f"{where} holds no token; put one there, for example from `openssl rand -hex 32`")
        return token


@dataclass(frozen=True)
class RayOptions:
    """Whether the work goes to a Ray cluster, and how much of one it takes. ray: the cluster's address, "" for the one
    that runs here or a new one; None: no Ray."""

    ray: str | None = field(default=None, metadata=about(
        "one worker per GPU of a Ray cluster: the one at ADDRESS, else the one running here, else a new one on this "
        "machine", nargs="?", const="", metavar="ADDRESS",
    ))  # fmt: skip
    workers: int | None = field(
        default=None, metadata=about("with --ray, at most", "GPUs, or nodes where there is none")
    )
    min_workers: int = field(default=1, metadata=about("with --ray, at least"))
    worker_cpus: float | None = field(default=None, metadata=about("with --ray, cores of a worker", "1, or a node's"))

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Settings:
    """All of `twinflow-rt serve`."""

    model: str
    load: LoadOptions
    server: ServerOptions
    limits: Limits
    ray: RayOptions

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare them to a parser."""
        model = "model folder (diffusers layout), hf://owner/name, or 'demo' (default)"
        parser.add_argument("model", nargs="?", default="demo", help=model)
        add_arguments(parser, LoadOptions, skip=LOAD_SKIPS)
        add_arguments(parser, ServerOptions, skip=TOKEN)
        add_arguments(parser.add_mutually_exclusive_group(), ServerOptions, only=TOKEN)
        add_arguments(parser, RayOptions)
        add_arguments(parser, Limits)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Settings:
        """Return what the parsed arguments ask for. Raise ConfigError."""
        limits = read_arguments(args, Limits)
        load = read_arguments(args, LoadOptions, largest=(None, None, limits.max_batch))
        return cls(args.model, load, read_arguments(args, ServerOptions), limits, read_arguments(args, RayOptions))

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.server.name or model_name(self.model)


def model_name(model: str) -> str:
    """Return a model's name without the folder it is in."""
    return "demo" if model == "demo" else Path(model).resolve().name
