"""The layout of the code: who may import whom (contracts in pyproject.toml), and how large files may get."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("twinflow_rt", "kernels", "tests", "benches")
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_imports_point_downwards():
    done = subprocess.run([sys.executable, "-c", LINT], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "Contracts:" in done.stdout and done.returncode == 0, done.stdout + done.stderr


def test_no_import_is_exempt_from_the_contracts():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert {contract["type"] for contract in settings["contracts"]} == {"layers", "acyclic_siblings"}
    for part in (settings, *settings["contracts"]):
        assert not [option for option in part if "ignore" in option or option in ("exclude_type_checking_imports",)]


def test_few_modules_lie_directly_in_the_package():
    assert len(list((ROOT / "twinflow_rt").glob("*.py"))) <= 10


def test_no_python_file_is_longer_than_500_lines():
    files = [ROOT / "setup.py", *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    assert len(files) > 300
    assert not {str(file): lines(file) for file in files if lines(file) > 500}


def test_the_readme_is_short():
    assert lines(ROOT / "README.md") <= 130
