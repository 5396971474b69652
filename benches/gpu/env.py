"""Facts of the machine and what of the project's dependencies it lacks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DEPENDENCIES = ("numpy", "safetensors", "tokenizers", "jinja2", "PIL", "rich", "pytest", "triton")
TOOLS = ("nvcc", "c++", "compute-sanitizer", "nvidia-smi", "git")


def facts(device: str) -> dict[str, Any]:
    from twinflow_rt.bench.facts import machine
    from twinflow_rt.cli import kernels as inventory

    return {
        "machine": machine(device),
        "implementations": inventory.machine(),
        "packages": inventory.packages(),
        "absent": [name for name in DEPENDENCIES if find_spec(name) is None],
        "tools": {name: _version(name) for name in TOOLS},
    }


def _version(tool: str) -> str | None:
    """The line of `tool --version` that holds a version, None where the tool is absent."""
    if shutil.which(tool) is None:
        return None
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=20, check=False)
    return next((line.strip() for line in done.stdout.splitlines() if re.search(r"\d+\.\d+", line)), "present")


def main(path: str) -> int:
    import torch

    found = facts("cuda" if torch.cuda.is_available() else "cpu")
    Path(path).write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
