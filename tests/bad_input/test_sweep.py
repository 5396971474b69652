"""Every public parameter with values of every other kind: taken, or refused by a named error in one short line.

The parameters come from the signatures, so a new one is swept without being named here. What a test may not do for
real (compile, write) is replaced; what passes the checks otherwise runs, on the smallest model.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import twinflow_rt
from tests.bad_input.sweep import sweep
from twinflow_rt.bench.settings import Settings
from twinflow_rt.config import CALL_NAMES, LOAD_NAMES, understands
from twinflow_rt.errors import CancelledError, TwinFlowError
from twinflow_rt.export import program
from twinflow_rt.loading import Asked, model_path
from twinflow_rt.options import LoadOptions
from twinflow_rt.sampling.noise import resolve_seeds
from twinflow_rt.serve.engine import Engine
from twinflow_rt.serve.settings import Limits, RayOptions, ServerOptions


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_options_of_load():
    """Without a model: all but what depends on one is refused here."""


    def check(**given):
        Asked.of(LoadOptions(**{"device": "cpu", **given}))

    sweep(check, of=[option.name for option in fields(LoadOptions)])


@pytest.mark.parametrize("options", [Limits, ServerOptions, RayOptions, Settings])
def test_options_of_servers_and_the_bench(options):
    """In a file of settings, or from Python, what argparse would not pass on."""
    names = [option.name for option in fields(options)]

    def make(**given):
        options(**given)

    sweep(make, of=names)


def test_options_that_a_model_refuses(source):
    """Values that are of the right kind, and wrong for this model."""
    for given in (
        {"tile": 1}, {"largest": (None, None, 10**5000)}, {"largest": (17, None, 1)}, {"skip_layers": ["w2"]},
        {"skip_layers": ["nothing"], "precision": "int8"}, {"text_skip_layers": ["mlp"]}, {"text_precision": "fp9"},
        {"preview": "nowhere"}, {"preview": "x" * 5000}, {"loras": ["nowhere"]}, {"capture": "on"},
        {"memory_budget": 1}, {"memory_budget": "1e400GB"}, {"nfe": 10**5000},
        {"precision": "int8", "skip_layers": "nowhere.json"}, {"prompt_cache": -1}, {"text_skip_layers": "mlp"},
        {"skip_layers": [""], "precision": "int8"}, {"skip_layers": [" "], "precision": "int8"},
    ):  # fmt: skip
        with pytest.raises(TwinFlowError) as refused:
            twinflow_rt.load(source, **{"device": "cpu", **given})
        assert len(str(refused.value)) < 1000, given


def test_paths_of_load():
    sweep(lambda path: twinflow_rt.load(path, device="cpu"))


LONG = "x" * 300


@pytest.mark.parametrize("name", [f"{LONG}/y", f"a/{LONG}", f"a/b@{LONG * 20}", f"a/b/{LONG}/c", "ö/ß", "a--b/c..d"])
def test_names_of_the_hub(name):
    with pytest.raises(TwinFlowError, match=r"no model of the hub|not in the local cache") as refused:
        twinflow_rt.load(f"hf://{name}")
    assert len(str(refused.value)) < 1000


def test_calls(pipe):
    sweep(pipe.__call__, prompt="a", height=16, width=16)


@pytest.mark.filterwarnings("ignore:.* is called .* now:DeprecationWarning")
def test_names_of_diffusers(pipe):
    """Every name of the tables, which no signature has."""

    @understands(LOAD_NAMES)
    def load(path="demo", **given):
        Asked.of(LoadOptions(**{"device": "cpu", **given}))
        model_path(path)

    def call(**given):
        pipe("a", height=16, width=16, **given)

    for table, function in ((CALL_NAMES, call), (LOAD_NAMES, load)):
        for name in table.keys() - {"prompt_embeds"}:  # stands for the prompt
            sweep(lambda value, name=name, function=function: function(**{name: value}), of=("value",))


def test_methods(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.program), "set_loras", lambda *_: None)
    monkeypatch.setattr("twinflow_rt.checkpoint.artifact.write", lambda folder, *_: folder)
    for method in (pipe.warm_up, pipe.set_loras, pipe.save, pipe.read_embeds, pipe.parallelize, pipe.text):
        sweep(method)
    sweep(pipe.accept, saved=None, where="x")
    sweep(lambda device=None, dtype=None: pipe.to(device=device, dtype=dtype))
    sweep(pipe("a", height=16, width=16).save)


def test_prompt_embeds(pipe):
    good = pipe.text(["a"])

    def call(embeds=good.embeds, lengths=good.lengths, extras=good.extras):
        pipe(replace(good, embeds=embeds, lengths=lengths, extras=extras), height=16, width=16)

    sweep(call)


def test_exports(source, monkeypatch):
    def stop(*_, **__):
        raise CancelledError("all arguments are checked")

    monkeypatch.setattr(program, "compile_into", stop)
    loaded, opened = program.load(source, device="cpu"), program.load

    def load(model, **options):
        if model is source:  # once is enough
            Asked.of(LoadOptions(**options))
            return loaded
        return opened(model, **options)

    monkeypatch.setattr(program, "load", load)
    sweep(program.export_model, model=source, output="a.pt2")
    sweep(twinflow_rt.load_exported, path="nowhere")


def test_requests(pipe):
    engine = Engine(pipe)
    sweep(engine.submit, prompt="a", height=16, width=16)
    engine.close()


def test_samplers_and_the_rest():
    sweep(twinflow_rt.SamplerConfig)
    sweep(twinflow_rt.preset, nfe=1)
    sweep(twinflow_rt.accelerate, pipe=torch.nn.Linear(1, 1))
    sweep(resolve_seeds, seed=0, count=1)


def test_numpy_counts_as_python(pipe):
    how = {"height": np.int16(16), "width": np.array(32), "num_images": np.uint8(2), "nfe": np.int64(1)}
    seeds = range(5, 9)
    images = pipe(np.array(["a", "b"]), **how, seed=seeds, output="np").images
    assert images.shape == (4, 16, 32, 3)
    for others in (list(seeds), np.arange(5, 9), torch.arange(5, 9), 5, np.int32(5)):
        assert np.array_equal(pipe(["a", "b"], **how, seed=others, output="np").images, images)
    config = twinflow_rt.SamplerConfig(np.int64(2), stochast_ratio=np.float32(1), rfba_gap_steps=np.array([0, 0.5]))
    assert config == twinflow_rt.SamplerConfig(2, 1.0, rfba_gap_steps=(0.0, 0.5))
    assert {type(value) for value in vars(config).values()} == {int, float, str, tuple, type(None)}
    times = twinflow_rt.SamplerConfig(times=np.array([1, 0.5]), mode="multi")
    assert times == twinflow_rt.SamplerConfig(2, times=(1.0, 0.5), mode="multi")


def test_numpy_counts_as_python_in_load():
    given = {
        "nfe": np.int64(2), "batch_invariant": np.bool_(True), "prompt_cache": np.int32(5), "tile": np.int64(64),
        "skip_layers": np.array(["w2"]), "largest": np.array([64, 64, 2]), "memory_budget": np.int64(10**9),
        "loras": [("a", np.float32(1))], "preview": Path("a"),
    }  # fmt: skip
    options = LoadOptions(**given)
    assert (options.nfe, options.batch_invariant, options.skip_layers) == (2, True, ("w2",))
    assert options.largest == (64, 64, 2) and Asked.of(options).budget == 10**9
    assert all(type(getattr(options, name)) in (int, bool) for name in ("nfe", "batch_invariant", "prompt_cache"))
