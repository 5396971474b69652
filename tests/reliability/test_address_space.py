"""Limits on a process's address space: a named error that says what to set, or an image; no crash in between."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twinflow_rt import host_memory
from twinflow_rt.checkpoint import files
from twinflow_rt.errors import ConfigError, OutOfMemoryError
from twinflow_rt.loading import load
from twinflow_rt.models.config import reading
from twinflow_rt.runtime import out_of_memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS, /proc")
MB = 1 << 20


def generate(limit: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `twinflow-rt generate` with `limit` bytes of address space and two threads."""
    command = [sys.executable, "-m", "twinflow_rt.cli", "generate", "a green triangle", "-o", str(folder / "a.png")]
    limiting = lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, preexec_fn=limiting)


def test_the_advice_is_followed_to_an_image(tmp_path):
    """Refused before torch is imported, refused before the model is loaded, made."""
    limit, refused = 300 * MB, 0
    while (done := generate(limit, tmp_path)).returncode:
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        last = done.stderr.splitlines()[-1]  # before it, what was being done
        advice = int(re.search(r"raise `ulimit -v` to at least (\d+)", last)[1]) * 1024  # type: ignore[index]
        assert advice > limit and not (tmp_path / "a.png").exists()
        limit, refused = advice, refused + 1
    assert 1 <= refused <= 3 and (tmp_path / "a.png").exists()


@pytest.mark.full
@pytest.mark.parametrize("limit", range(200, 1400, 20))
def test_any_limit(tmp_path, limit):
    done = generate(limit * MB, tmp_path)
    assert done.returncode in (0, 2) and (done.returncode == 0) == (tmp_path / "a.png").exists(), done.stderr
    assert done.returncode == 0 or "raise `ulimit -v` to at least" in done.stderr


@pytest.mark.parametrize("refusal", [1, 2], ids=["before", "after"])
def test_loading_asks_before_and_after(monkeypatch, refusal):
    asked = []

    def lacking(needed: int) -> str | None:
        asked.append(needed)
        return "too little; raise it" if len(asked) == refusal else None

    monkeypatch.setattr(out_of_memory, "lacking_address_space", lacking)
    with pytest.raises(OutOfMemoryError, match=r"than is free \(too little; raise it") as error:
        load("demo", device="cpu")
    assert len(asked) == refusal and ("OMP_NUM_THREADS" in str(error.value)) == (refusal == 1)
    assert asked[0] > host_memory.address_space_margin(torch.get_num_threads()) and asked[-1] >= 256 * MB


def test_what_is_lacking(monkeypatch):
    used = host_memory.status_bytes("VmSize")
    monkeypatch.setattr(host_memory, "status_bytes", lambda key: used)
    for limit, lack in ((used + 100 * MB, "100 of 200 MB"), (used - 1, "0 of 200 MB"), (used + 200 * MB, None)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        said = host_memory.lacking_address_space(200 * MB)
        assert said is None if lack is None else said.startswith(lack)
        assert said is None or int(said.split()[-1]) * 1024 >= used + 200 * MB
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert host_memory.lacking_address_space(1 << 50) is None and host_memory.torch_bytes() == 0


def test_files_that_cannot_be_mapped(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")

    def full(*args, **kwargs):
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr("safetensors.safe_open", full)
    with pytest.raises(OutOfMemoryError, match=r"cannot be mapped \(Cannot allocate memory"):
        files.open_tensors(tmp_path / "a.safetensors")


MAPPING = "unable to mmap 5562344 bytes from file <m>: Cannot allocate memory (12)"


@pytest.mark.parametrize("error", [RuntimeError(MAPPING), OSError(12, "Cannot allocate memory"), ImportError(
    "libXau.so.6: failed to map segment from shared object")], ids=repr)  # fmt: skip
def test_libraries_that_find_no_room(error):
    def fail() -> None:
        raise error

    with pytest.raises(OutOfMemoryError, match="loading needs more memory"):
        out_of_memory.named("loading")(fail)()


def test_a_config_is_not_blamed_for_memory():
    for error, kind in ((RuntimeError(MAPPING), RuntimeError), (RuntimeError("shape"), ConfigError)):
        with pytest.raises(kind) as caught, reading("config.json"):
            raise error
        assert type(caught.value) is kind
