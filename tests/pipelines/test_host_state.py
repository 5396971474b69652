"""What the host program has set in torch does not reach a model's arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.factory import FAMILIES, make_model
from twinflow_rt.loading import load


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Doubling(TorchFunctionMode):
    """A mode of the host's own, which changes what a function computes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.nn.functional.linear else result


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "another device by default": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "a function mode": Doubling,
}


@pytest.fixture(scope="module", params=[*FAMILIES, "openuni"])
def model(request, tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("host") / "m", request.param)
    return folder, drawn(load(folder, device="cpu", nfe=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("host") / "m")


def drawn(pipe):
    return pipe("a red square", height=32, width=32, seed=1, output="pt").images


@pytest.mark.parametrize("state", STATES)
def test_loading_and_calling_do_not_see_it(model, state):
    """The same bits as without it; and the host has it back."""
    folder, want = model
    with STATES[state]():
        pipe = load(folder, device="cpu", nfe=2)
        inside = drawn(pipe)
        probe = torch.mm(torch.ones(2, 2), torch.ones(2, 2)), torch.is_inference_mode_enabled()
    with STATES[state]():
        untouched = torch.mm(torch.ones(2, 2), torch.ones(2, 2)), torch.is_inference_mode_enabled()
    assert torch.equal(inside, want) and inside.dtype == torch.float32
    assert torch.equal(drawn(pipe), want)
    assert (probe[0].dtype, probe[0].device, probe[1]) == (untouched[0].dtype, untouched[0].device, untouched[1])


def test_other_entries_do_not_see_it(folder, tmp_path):
    """Prompts encoded, adapters merged and programs saved inside autocast and a default device are the same."""
    pipe = load(folder, device="cpu")
    want, states = drawn(pipe), pipe.text(["a red square"]).embeds
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode():
        assert torch.equal(pipe.text(["a red square"]).embeds, states)
        pipe.set_loras()
        pipe.warm_up(32, 32)
        assert str(pipe.plan)
        pipe.save(tmp_path / "saved")
    assert torch.equal(drawn(pipe), want)
    pipe.set_loras()  # weights that inference mode made could not be written to
    assert torch.equal(drawn(load(tmp_path / "saved", device="cpu")), want)


@contextmanager
def all_of_it() -> Iterator[None]:
    states = torch.autocast("cpu", torch.float16), torch.device("meta"), torch.inference_mode(), Doubling()
    with default_dtype(torch.float16), ExitStack() as stack:
        for state in states:
            stack.enter_context(state)
        yield


VARIANTS = {
    "int8": {"precision": "int8", "text_precision": "int8"},
    "tiles": {"tile": 64, "capture": "off"},
    "streams": {"memory_budget": "2900KB", "largest": (16, 96, 1)},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_other_ways_of_computing_do_not_see_it(folder, options):
    """... nor do the plans that loading makes first. Wide, so that there are tiles."""

    def outputs():
        pipe = load(folder, device="cpu", **options)
        return pipe("a", height=16, width=96, seed=1, output="pt").images, pipe.plan.stages, pipe.memory

    want = outputs()
    with all_of_it():
        got = outputs()
    assert torch.equal(got[0], want[0]) and got[1:] == want[1:]
