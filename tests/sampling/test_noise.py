"""Seeds and per-image noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinflow_rt.errors import ConfigError, TwinFlowError
from twinflow_rt.sampling.noise import MAX_SEED, initial_noise, resolve_seeds, step_noise, stream_seed

SHAPE = (4, 6, 5)
seeds_strategy = st.lists(st.integers(0, MAX_SEED), min_size=1, max_size=5)


@given(seeds_strategy, st.integers(0, 100), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_an_image_depends_on_its_own_seed_only(seeds, step, random):
    batch = step_noise(seeds, step, SHAPE)
    order = list(range(len(seeds)))
    random.shuffle(order)
    shuffled = step_noise([seeds[k] for k in order], step, SHAPE)
    for place, k in enumerate(order):
        assert torch.equal(shuffled[place], batch[k])
        assert torch.equal(step_noise([seeds[k]], step, SHAPE)[0], batch[k])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_casts_the_same_draw(dtype):
    wide = initial_noise([3, 4], SHAPE)
    assert wide.dtype == torch.float32
    cast = initial_noise([3, 4], SHAPE, dtype)
    assert cast.dtype == dtype and torch.equal(cast, wide.to(dtype))


def test_device_argument_moves_after_the_draw():
    assert initial_noise([3], SHAPE, device="meta").device.type == "meta"


DRAWS_OTHERWISE = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, SHAPE), (torch.float32, (3,)),
        pytest.param(
            torch.bfloat16, (4, 6, 6),
            marks=pytest.mark.skipif(DRAWS_OTHERWISE, reason="torch 2.11 draws other values in bfloat16"),
        ),
    ],
)  # fmt: skip
def test_stream_zero_is_a_plain_torch_draw(seed, dtype, shape):
    """In bfloat16 too, the dtype TwinFlow's scripts draw in, for multiples of 16 values."""
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    assert torch.equal(initial_noise([seed], shape, dtype)[0], plain)


def test_stream_seeds_are_splitmix64():
    # the first outputs of the published generator for state 1234567, upper halves
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [stream_seed(1234567, i) for i in (1, 2, 3)] == [v >> 32 for v in outputs]


def test_streams_and_wide_seeds_differ():
    draws = [step_noise([s], i, SHAPE) for s in (5, 6, 5 + 2**32, MAX_SEED) for i in range(4)]
    for a in range(len(draws)):
        for b in range(a):
            correlation = torch.corrcoef(torch.stack((draws[a].flatten(), draws[b].flatten())))
            assert correlation[0, 1].abs() < 0.4  # 120 values: a standard error is 0.09


def test_torch_reads_32_bits_of_a_seed():
    """Why wide seeds are hashed; should torch change, this says so."""
    a, b = (torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32))
    assert torch.equal(a, b)


@pytest.mark.parametrize("step", [0, 1, 7])
def test_noise_is_standard_normal(step):
    x = step_noise([11, 12], step, (4, 100, 100)).double()
    assert abs(x.mean()) < 0.015 and abs(x.var() - 1) < 0.025 and abs((x**4).mean() - 3) < 0.2


def test_resolve_seeds():
    assert resolve_seeds(7, 3) == [7, 8, 9]
    assert resolve_seeds([5, 1], 2) == [5, 1]
    assert resolve_seeds((0,), 1) == [0]
    assert resolve_seeds(MAX_SEED, 1) == [MAX_SEED]
    assert resolve_seeds(np.int64(4), 2) == [4, 5]
    assert all(type(s) is int for s in resolve_seeds([np.int32(4)], 1))


def test_no_seed_draws_a_reproducible_run():
    first, second = resolve_seeds(None, 3), resolve_seeds(None, 3)
    assert first != second
    assert first == resolve_seeds(first[0], 3)
    assert first[0] >= 0 and first[-1] < 2**32


@pytest.mark.parametrize(
    ("seed", "count"),
    [
        (-1, 1), (MAX_SEED + 1, 1), (MAX_SEED, 2), (True, 1), (1.0, 1), ("7", 1), ([1, 2], 3),
        ([], 1), ([1, -1], 2), ([1, False], 2), ([1, 2.0], 2), ([None], 1), ({1, 2}, 2),
        (1, 0), (1, -1), (1, True), (1, 2.0),
    ],
)  # fmt: skip
def test_bad_seeds_are_refused(seed, count):
    with pytest.raises(ConfigError, match="seed") as info:
        resolve_seeds(seed, count)
    assert isinstance(info.value, TwinFlowError) and isinstance(info.value, ValueError)
