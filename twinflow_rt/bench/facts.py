"""Which machine and which software a figure belongs to. No names of users, hosts or folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..runtime.machine import cpu_lines, cpu_model

PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "torchao")
# nvidia-smi's field -> the record's
GPU_FIELDS = {
    "driver_version": "driver", "power.limit": "power_limit_w", "clocks.max.sm": "max_sm_clock_mhz",
    "clocks.sm": "sm_clock_mhz", "clocks.mem": "memory_clock_mhz", "temperature.gpu": "temperature_c",
}  # fmt: skip
# what makes two records comparable: the hardware, not its state or the software being compared
IDENTITY = ("cpu", "cores", "gpu")


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the facts of this machine as JSON can hold them; `gpu` is None where `device` is a CPU."""
    device = torch.device(device)
    clock = next((line for line in cpu_lines() if line.startswith("cpu MHz")), None)  # the first core's
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(), "cpu_clock_mhz": clock and float(clock.partition(":")[2]),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": gpu_facts(device) if device.type == "cuda" else None, "python": platform.python_version(),
        "cuda": torch.version.cuda, "packages": versions(), "commit": commit(),
    }  # fmt: skip


def same_machine(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return what differs between two records' hardware, in words; nothing if they are comparable."""
    differing = []
    for key in IDENTITY:
        x, y = a[key], b[key]
        if key == "gpu":
            x, y = x and x["name"], y and y["name"]
        if x != y:
            differing.append(f"{key}: {x} against {y}")
    if a["threads"] != b["threads"]:
        differing.append(f"threads: {a['threads']} against {b['threads']}")
    return differing


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Return name, size and, where nvidia-smi answers, driver, clocks and power limit of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
    }
    return {**facts, **_smi(str(getattr(properties, "uuid", "")))}


def _smi(uuid: str) -> dict[str, Any]:
    """Ask nvidia-smi about the GPU of that uuid (the first GPU where torch gives none)."""
    if shutil.which("nvidia-smi") is None:
        return dict.fromkeys(GPU_FIELDS.values())
    query = ["nvidia-smi", f"--query-gpu=uuid,{','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
    return parse_smi(answer, uuid)


def parse_smi(answer: str, uuid: str) -> dict[str, Any]:
    """Return the record's fields from nvidia-smi's lines; None for what it does not tell."""
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.count(",")]
    bare = uuid.removeprefix("GPU-")
    row = next((r for r in rows if bare and r[0].removeprefix("GPU-") == bare), rows[0] if rows else [])
    cells = dict(zip(GPU_FIELDS.values(), row[1:], strict=False))
    return {key: _number(cells.get(key)) if key != "driver" else cells.get(key) for key in GPU_FIELDS.values()}


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:  # "[N/A]"
        return None


def versions() -> dict[str, str | None]:
    """Return the installed versions of what a figure can depend on; None for what is absent."""
    found: dict[str, str | None] = {}
    for name in ("twinflow-rt", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Return the checkout's commit, with `+changes` where tracked files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
