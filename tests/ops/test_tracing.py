"""Tables that are kept between calls: once per size, never those of a tracer, and usable under autograd."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from twinflow_rt import load
from twinflow_rt.ops import tracing
from twinflow_rt.ops.tracing import TableCache

CPU = torch.device("cpu")


def pair(n: int, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n,), float(n), device=device), torch.zeros(n, device=device)


def test_a_table_is_made_once_per_key_and_the_oldest_go():
    tables, made = TableCache(), []
    get = lambda n: tables(n, CPU, lambda: (made.append(n), pair(n))[1])
    assert get(1) is get(1) and made == [1]
    for n in range(2, tracing.KEPT + 2):
        get(n)
    get(1)
    assert made == [1, *range(2, tracing.KEPT + 2), 1]


def test_what_is_kept_serves_autograd():
    tables, w = TableCache(), torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        kept, _ = tables("a", CPU, lambda: pair(3))
    (w * kept).sum().backward()
    assert torch.equal(w.grad, kept)


def test_tracers_and_other_devices_make_their_own():
    tables = TableCache()
    with FakeTensorMode():
        tables("a", CPU, lambda: pair(3))
    kept, _ = tables("a", CPU, lambda: pair(3))
    assert type(kept) is torch.Tensor
    assert tables("a", torch.device("meta"), lambda: pair(3, torch.device("meta")))[0].is_meta
    traced = torch.jit.trace(lambda x: x * tables("b", CPU, lambda: pair(2))[0], torch.ones(2), check_trace=False)
    assert torch.equal(traced(torch.ones(2)), torch.full((2,), 2.0))
    assert "b" not in tables._made


def test_prompts_and_sizes_that_come_again_give_equal_images():
    pipe = load("demo", device="cpu", dtype="float32")
    calls = [("a red circle", 64), ("a red circle above a blue square and a green triangle", 64), ("a red circle", 32)]
    first, again = ([pipe(p, height=h, seed=3, output="np").images for p, h in calls] for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
