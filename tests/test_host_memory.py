"""Memory of the process: what Linux tells, and malloc's thresholds."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from twinflow_rt import host_memory, load

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("key", ["VmPeak", "VmHWM", "VmRSS", "VmSwap"])
def test_sizes_of_the_status_file(key):
    line = next(line for line in Path(host_memory.STATUS).read_text().splitlines() if line.startswith(key + ":"))
    assert host_memory.status_bytes(key) == pytest.approx(1024 * int(line.split()[1]), rel=0.05, abs=1 << 22)
    assert host_memory.status_bytes("Vm") is None and host_memory.status_bytes(key[1:]) is None


def test_without_a_status_file(monkeypatch):
    monkeypatch.setattr(host_memory, "STATUS", "/nowhere/status")
    assert host_memory.status_bytes("VmRSS") is None
    assert host_memory.resident_bytes() == host_memory.peak_bytes() > 1e6


@pytest.mark.parametrize(
    "name, value", [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
def test_the_users_thresholds_stay(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not host_memory.keep_freed_memory()


@GLIBC
def test_images_fault_no_memory_in_again():
    pipe = load("demo", device="cpu", dtype="float32")
    faults = []
    for seed in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pipe("a red circle", seed=seed, output="pt")
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults[3:]) < 50  # without `keep_freed_memory` hundreds


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="needs Linux with transparent huge pages")
def test_large_blocks_lie_in_huge_pages():
    """Of a process of its own: whether a page is huge is told of the mapping that it lies in."""
    script = """
import torch
from twinflow_rt.ops.native.register import roomy
for wanted in (False, True):
    x = torch.empty(96 << 20, dtype=torch.uint8)
    x = (roomy(x) if wanted else x).fill_(1)
    found, inside = 0, False
    for line in open("/proc/self/smaps"):
        head, _, rest = line.partition(" ")
        if "-" in head:
            first, last = (int(n, 16) for n in head.split("-"))
            inside = first <= x.data_ptr() + x.nbytes // 2 < last
        elif inside and head == "AnonHugePages:":
            found = int(rest.split()[0]) << 10
    print(wanted, found)
    del x
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    (_, small), (_, huge) = (line.split() for line in done.stdout.splitlines())
    assert int(huge) > 0  # as many as the system had
    assert int(small) == 0 or "[always]" in THP.read_text()
