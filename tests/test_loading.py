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
from twinflow_rt import cli
from twinflow_rt.loading import load
from twinflow_rt.options import LoadOptions, flag, read_arguments

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


@pytest.mark.parametrize("command", ["generate", "serve", "batch", "eval"])
def test_every_command_that_makes_images_takes_the_options(command):
    """All that can be written there; what each means for the model is `load`'s to say."""
    own = {"generate": {"--preview"}, "eval": set()}.get(command, set())
    parser, words = cli.build_parser([command]), {"batch": ["m", "p.txt", "-o", "out"]}.get(command, [])
    given = {
        "--device": "cpu", "--dtype": "float32", "--nfe": "2", "--lora": "a:0.5", "--precision": "int8",
        "--skip-layers": "w2", "--text-precision": "int8", "--text-skip-layers": "mlp", "--prompt-cache": "100",
        "--capture": "off", "--memory-budget": "1GB", "--tile": "64", "--fp8-attention": None, "--download": None,
        "--batch-invariant": None, "--no-check-finite": None, "--base": "b", "--files": "f",
        **dict.fromkeys(own, "folder"),
    }  # fmt: skip
    assert {flag(option) for option in OPTIONS.values()} - {None} == {*given, "--preview"}
    words += [word for name, value in given.items() for word in (name, value) if word is not None]
    options = read_arguments(parser.parse_args([command, *words]), LoadOptions, nfe=2)  # of eval: a list
    expected = LoadOptions(
        device="cpu", dtype="float32", nfe=2, loras=[("a", 0.5)], precision="int8",
        skip_layers=["w2"], text_precision="int8", text_skip_layers=["mlp"], prompt_cache=100, capture="off",
        memory_budget="1GB", tile=64, fp8_attention=True, download=True, batch_invariant=True,
        check_finite=False, base="b", files=("f",),
        preview="folder" if own else None,
    )  # fmt: skip
    assert options == expected
    old = parser.parse_args([command, *words, "--exempt", "w1", "w3"])
    assert old.skip_layers == ["w1", "w3"] and "--exempt" not in parser.format_help()


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
    assert pipe.plan.skip_layers == again.plan.skip_layers == tuple(skipped)
    assert pipe.text.options.skip_layers == again.text.options.skip_layers == ("layers.mlp.down_proj",)
    with pytest.raises(TypeError, match="another name of skip_layers="):
        load(folder, exempt=skipped, skip_layers=skipped)


def test_an_interrupt_while_tensors_are_read_is_one(tmp_path, monkeypatch):
    """Torch makes a ValueError of what is raised while it looks at mapped bytes."""
    folder, whole = make_model(tmp_path / "m"), torch.UntypedStorage.__getitem__

    def interrupted(storage, index):
        if isinstance(index, int):
            raise KeyboardInterrupt
        return whole(storage, index)

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "__getitem__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(folder, device="cpu")
    assert load(folder, device="cpu")("a", height=16, width=16).images


def test_ops_whose_import_was_interrupted_are_registered_when_it_comes_again():
    from twinflow_rt.ops.native.register import PLAIN, _libraries, like, op

    op("interrupted(Tensor x) -> Tensor", like)  # and no more of it

    @op("interrupted(Tensor x) -> Tensor", like)
    def interrupted(x):
        return x + 1

    assert torch.equal(torch.ops.twinflow.interrupted(torch.zeros(2)), torch.ones(2))
    assert torch.equal(interrupted(torch.zeros(2)), torch.ones(2))
    del PLAIN[torch.ops.twinflow.interrupted.default]
    _libraries.pop("interrupted")._destroy()
