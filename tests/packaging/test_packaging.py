"""What a user meets before the first image: a light import, the package map, names that resolve."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import twinflow_rt

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "transformers", "diffusers", "triton", "rich", "PIL", "tokenizers", "safetensors", "scipy")


def modules_after(statement: str) -> set[str]:
    """Top-level modules present once a fresh interpreter, outside the checkout, has run `statement`."""
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_is_light():
    loaded = modules_after("import twinflow_rt, twinflow_rt.kernels, twinflow_rt.errors; dir(twinflow_rt)")
    assert not loaded & set(HEAVY)


def test_native_is_loaded_on_use_only():
    code = "import twinflow_rt.ops.native.norm, sys; assert 'twinflow_rt._native' not in sys.modules"
    assert not modules_after(code) & {"transformers", "diffusers", "triton", "rich", "PIL"}


def test_public_names_resolve():
    for name in twinflow_rt.__all__:
        assert getattr(twinflow_rt, name) is not None
    assert set(dir(twinflow_rt)) == set(twinflow_rt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        twinflow_rt.lode  # noqa: B018


def test_installed_as_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata.version("twinflow-rt") == project["version"] == twinflow_rt.__version__
    scripts = metadata.entry_points(group="console_scripts", name="twinflow-rt")
    assert [s.value for s in scripts] == [project["scripts"]["twinflow-rt"]]
    requires = metadata.requires("twinflow-rt")
    for extra in ("gpu", "eval", "train", "test"):
        assert any(f'extra == "{extra}"' in line for line in requires)


def test_kernels_come_from_the_folder_of_that_name():
    import twinflow_rt.kernels

    source = Path(twinflow_rt.kernels.__file__).parent
    assert source.name == "kernels" and "twinflow_rt.kernels" in twinflow_rt.kernels.__name__
    for file in (ROOT / "kernels").glob("*.py"):
        assert (source / file.name).exists()


def test_every_package_is_installed():
    """A folder of Python files without __init__.py would be missing from wheels."""
    for file in (ROOT / "twinflow_rt").rglob("*.py"):
        assert (file.parent / "__init__.py").exists(), file
