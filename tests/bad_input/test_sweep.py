"""Every public parameter with values of every other kind: taken, or refused by a named error in one short line.

The parameters come from the signatures, so a new one is swept without being named here. What a test may not do for
real (compile, write) is replaced; what passes the checks otherwise runs, on the smallest model.
"""

from __future__ import annotations

import datetime
import decimal
import fractions
import inspect
import threading
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import twinflow_rt
from twinflow_rt.config import CALL_NAMES, LOAD_NAMES, understands
from twinflow_rt.errors import CancelledError, TwinFlowError
from twinflow_rt.export import program
from twinflow_rt.loading import Asked, model_path
from twinflow_rt.options import LoadOptions
from twinflow_rt.sampling.noise import resolve_seeds


class Hostile:
    """Everything that Python may ask of it fails."""

    __hash__ = None

    def fail(self, *_):
        raise OSError("no")

    __repr__ = __str__ = __eq__ = __len__ = __iter__ = __index__ = __float__ = __bool__ = __fspath__ = fail


def odd_values():
    """Values, made anew each time as some are used up."""
    return [
        True, False, None, "", " ", "a", "x" * 100_000, "\0", "\ud800", "1", "nan", b"", b"bytes", bytearray(b"x"),
        0, 1, -1, 3, 2**31, 2**63, 2**64, 10**5000, -(10**5000), 0.0, 1.0, 0.5, -0.5, 1e300, -1e300, float("nan"),
        float("inf"), 1j, [], [[]], [[1]], [None], [""], ["a"], ["\ud800"], [1], [-1], [1, 2, 3], [10**5000], (), (1,),
        (None, None, 1), (None, None, None), ("a", 1.0), {}, {"a": 1}, {1: None}, {"a": float("nan")}, {"a"},
        frozenset(), range(0), range(1), range(3), object(), object, Hostile(), [Hostile()], {"a": Hostile()},
        lambda: None, lambda a: None, lambda a, b, c, d: None, (x for x in "a"), iter(["a"]), map(str, [1]),
        np.int64(1), np.int8(-1), np.uint64(2**63), np.float32(1), np.float64("nan"), np.bool_(True), np.str_("a"),
        np.array(1), np.array([1]), np.array([1, 2]), np.array([]), np.array(["a"]), np.array([None]),
        np.zeros((2, 2)), torch.tensor(1), torch.tensor([1]), torch.tensor(True), torch.ones(2), torch.ones(2, 2),
        torch.empty((), dtype=torch.int64, device="meta"), torch.empty(3, device="meta"), torch.float32, torch.int8,
        torch.device("cpu"), torch.device("meta"), torch.Generator(), torch.nn.Parameter(torch.ones(1)), Path("a"),
        Path("x" * 5000), NotImplemented, Ellipsis, Exception("x"), slice(1), memoryview(b"a"), decimal.Decimal(1),
        fractions.Fraction(1), datetime.timedelta(1), threading.Lock(), np,
    ]  # fmt: skip


def sweep(call, of=None, **good):
    """Call with each odd value in the place of each parameter, or of those named in `of`; the others are those in
    `good`, or have defaults."""
    taken = Counter()
    names = of or tuple(inspect.signature(call).parameters)
    for name in names:
        for value in odd_values():
            given = {**good, name: value}
            try:
                call(**given)
                taken[name] += 1
            except TwinFlowError as error:
                text = str(error)
                assert "\n" not in text and len(text) < 1000, (name, type(value), text)
            except Exception as error:
                raise AssertionError(f"{name}={type(value)}: a raw {type(error).__name__}: {error}") from error
    assert all(taken[name] < len(odd_values()) / 4 for name in names), taken  # nothing takes whatever it is given


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_options_of_load():
    """Without a model: all but what depends on one is refused here."""
    parameters = [
        inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
        for option in fields(LoadOptions)
    ]

    def check(**given):
        Asked.of(LoadOptions(**{"device": "cpu", **given}))

    check.__signature__ = inspect.Signature(parameters)
    sweep(check)


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
    for method in (pipe.warm_up, pipe.set_loras, pipe.save, pipe.read_embeds, pipe.parallelize):
        sweep(method)


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
    assert {type(value) for value in vars(config).values()} == {int, float, str, tuple}


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
