"""`twinflow-rt serve`: a model over HTTP."""

from __future__ import annotations

import argparse

from ..errors import require_extra
from ..serve.settings import Settings
from .options import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    Settings.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    require_extra("serving", "serve", "fastapi", "uvicorn", "prometheus_client")
    if args.ray is not None:
        require_extra("--ray", "ray", "ray")
    from ..serve import server

    settings = Settings.of(args)
    return server.run(settings, lambda: load_model(args, largest=settings.load.largest))
