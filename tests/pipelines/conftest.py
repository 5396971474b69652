"""Ordinary flow models, made and opened once for each file of tests."""

from __future__ import annotations

from functools import cache

import pytest

from tests.pipelines.plain_models import peer_of, plain_model
from twinflow_rt.loading import load


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """plain_folder(name): that miniature."""
    base = tmp_path_factory.mktemp("plain")
    return cache(lambda name: plain_model(name, base / name))


@pytest.fixture(scope="module")
def plain_pipes(plain_folder):
    """plain_pipes(name): that miniature loaded here, and diffusers' pipeline."""
    return cache(lambda name: (load(plain_folder(name), device="cpu"), peer_of(name, plain_folder(name))))
