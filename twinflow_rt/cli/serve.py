"""`twinflow-rt serve`: a model over HTTP."""

from __future__ import annotations

import argparse

from ..errors import extra_missing
from ..serve.settings import Settings
from .options import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    Settings.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    try:
        from ..serve import server
    except ModuleNotFoundError as error:
        raise extra_missing(f"serving needs {error.name}", "serve") from None
    settings = Settings.of(args)
    return server.run(settings, lambda: load_model(args, largest=settings.load.largest))
