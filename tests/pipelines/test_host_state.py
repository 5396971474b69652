"""What the host program has set in torch does not reach a model's arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

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


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "another device by default": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.fixture(scope="module", params=[*FAMILIES, "openuni"])
def model(request, tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("host") / "m", request.param)
    return folder, drawn(load(folder, device="cpu", nfe=2))


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


def test_other_entries_do_not_see_it(tmp_path):
    """Prompts encoded, adapters merged and programs saved inside autocast and a default device are the same."""
    pipe = load(make_model(tmp_path / "m"), device="cpu")
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
