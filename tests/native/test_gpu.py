"""The native GPU kernels against float64 arithmetic; runs on machines with a CUDA device only."""

from __future__ import annotations

import pytest
import torch

from tests.native.test_native import DTYPES, draw, exact_rms, judge, weights
from twinflow_rt import native, ops

pytestmark = pytest.mark.gpu
SHAPES = ((1, 1, 8), (2, 37, 199), (3, 5, 760), (2, 9, 3840), (1, 3, 8192), (2, 0, 16))


@pytest.fixture(autouse=True)
def built():
    if reason := native.unavailable_reason("cuda"):
        pytest.skip(reason)


def on_gpu(*tensors):
    return [None if x is None else x.cuda() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_norms(shape, dtype, per_sample):
    x, branch = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=5)
    post, pre = weights(shape, per_sample, 1), weights(shape, per_sample, 2)
    got = native.rms_norm(*on_gpu(x, pre), 1e-5).cpu()
    judge(got, ops.rms_norm(x, pre, 1e-5), exact_rms(x, pre, 1e-5))
    total, h = native.residual_norm(*on_gpu(x, branch, post, pre), 1e-5)
    judge(total.cpu(), ops.residual_norm(x, branch, post, None, 1e-5)[0], x.double() + exact_rms(branch, post, 1e-5))
    judge(h.cpu(), ops.rms_norm(total.cpu(), pre, 1e-5), exact_rms(total.cpu(), pre, 1e-5))
    alone, nothing = native.residual_norm(*on_gpu(x, branch, post, None), 1e-5)
    assert nothing is None and torch.equal(alone, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_unaligned_rows(dtype):
    wide, w = draw(4, 9, 70, dtype=dtype).cuda(), (1 + draw(33)).cuda()
    for x in (wide[..., :32], wide[:, 2:7, 1:33], wide[..., 5:38]):
        weight = w[: x.shape[2]]
        torch.testing.assert_close(native.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 37, 19), (3, 1, 8, 64), (2, 3, 16, 64)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_to_uint8_is_exact(shape, dtype, layout):
    image = (1.5 * draw(*shape, dtype=dtype)).contiguous(memory_format=layout)
    assert torch.equal(native.to_uint8(image.cuda()).cpu(), ops.to_uint8(image))
