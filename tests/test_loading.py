"""The options of `load`: declared once, and every place that has them agrees."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tests.factory import make_model
from twinflow_rt.loading import load
from twinflow_rt.options import LoadOptions

OPTIONS = {option.name: option for option in fields(LoadOptions)}


def test_the_signature_of_load_is_the_options():
    path, *parameters = inspect.signature(load).parameters.values()
    assert (path.name, path.default) == ("path", "demo")
    assert [p.name for p in parameters] == list(OPTIONS)
    for parameter in parameters:
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == OPTIONS[parameter.name].default
        assert parameter.annotation == OPTIONS[parameter.name].type
        assert f"\n    {parameter.name}: " in load.__doc__


def test_load_is_short():
    assert len(inspect.getsource(inspect.unwrap(load)).splitlines()) <= 40


def test_options_reach_ray_workers_and_the_command_line_without_torch():
    options = LoadOptions(device="cpu", dtype=torch.float32, loras={Path("a"): 1.0}, largest=(None, None, 4))
    assert pickle.loads(pickle.dumps(options)) == options
    code = "import sys, twinflow_rt.options; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_old_names_work_and_warn(tmp_path):
    folder, skipped = make_model(tmp_path / "m"), ["layers.feed_forward.w2"]
    how = {"device": "cpu", "dtype": "float32", "precision": "int8", "text_precision": "int8"}
    with pytest.warns(DeprecationWarning) as warned:
        pipe = load(folder, exempt=skipped, text_exempt=["layers.mlp.down_proj"], **how)
    assert {str(w.message) for w in warned} == {
        "exempt= is called skip_layers= now", "text_exempt= is called text_skip_layers= now"
    }  # fmt: skip
    assert all(w.filename == __file__ for w in warned)
    again = load(folder, skip_layers=skipped, text_skip_layers=["layers.mlp.down_proj"], **how)
    assert pipe.plan.exempt == again.plan.exempt == tuple(skipped)
    assert pipe.text.options.skip_layers == again.text.options.skip_layers == ("layers.mlp.down_proj",)
    with pytest.raises(TypeError, match="old name"):
        load(folder, exempt=skipped, skip_layers=skipped)
