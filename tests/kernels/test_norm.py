"""Row norms against float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from oracle import draw, judge, judge_quantized, strided

from twinflow_rt import ops
from twinflow_rt.errors import ConfigError
from twinflow_rt.kernels import launch, norm

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 1, 1), (2, 5, 37), (3, 3, 199), (2, 3, 760), (1, 5, 1128), (1, 3, 144), (2, 0, 16), (1, 1, 5000))
EPS = 1e-5


def weight(shape, per_sample, seed):
    b, _, d = shape
    return 1 + 0.3 * (draw(b, 1, d, seed=seed) if per_sample else draw(d, seed=seed))


def exact_rms(x, w):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * w.double()


def exact_layer(x, w, bias):
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    y = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    y = y if w is None else y * w.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype, per_sample):
    x, w = draw(*shape, dtype=dtype), weight(shape, per_sample, 1)
    judge(norm.rms_norm(strided(x), w, EPS), ops.rms_norm(x, w, EPS), exact_rms(x, w))


@pytest.mark.parametrize("weighted, biased", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape, dtype, weighted, biased):
    x = (draw(*shape, dtype=torch.float32) + 3).to(dtype)
    w = weight(shape, True, 1) if weighted else None
    bias = weight(shape, True, 2) if biased else None
    judge(norm.layer_norm(strided(x), w, EPS, bias), ops.layer_norm(x, w, EPS, bias), exact_layer(x, w, bias))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_norm(shape, dtype, per_sample):
    x, branch = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=5)
    post, pre = weight(shape, per_sample, 1), weight(shape, per_sample, 2)
    eager = ops.residual_norm(x, branch, post, pre, EPS)
    got = norm.residual_norm(strided(x), strided(branch), post, pre, EPS)
    judge(got[0], eager[0], x.double() + exact_rms(branch, post))
    judge(got[1], ops.rms_norm(got[0], pre, EPS), exact_rms(got[0], pre))
    alone, nothing = norm.residual_norm(x, branch, post, None, EPS)
    assert nothing is None and torch.equal(alone, got[0])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_layer_norm(shape, dtype, full):
    x, branch = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=5)
    gate, w, bias = (weight(shape, True, i) if full else None for i in (1, 2, 3))
    eager = ops.residual_layer_norm(x, branch, gate, w, bias, EPS)
    got = norm.residual_layer_norm(strided(x), strided(branch), gate, w, bias, EPS)
    judge(got[0], eager[0], x.double() + branch.double() * (1 if gate is None else gate.double()))
    judge(got[1], ops.layer_norm(got[0], w, EPS, bias), exact_layer(got[0], w, bias))


QUANTIZED = (torch.float8_e4m3fn, torch.int8)
ROWS = ((2, 5, 37), (3, 3, 199), (1, 2, 1128), (2, 0, 16), (1, 1, 1))


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_quantized_norms(shape, dtype, quantized):
    x, w, bias = (draw(*shape) + 1).to(dtype), weight(shape, True, 1), weight(shape, True, 2)
    for got, eager, exact in (
        (norm.rms_norm_quantized(strided(x), w, EPS, quantized),
         ops.rms_norm_quantized(x, w, EPS, quantized), exact_rms(x, w)),
        (norm.layer_norm_quantized(strided(x), w, EPS, bias, quantized),
         ops.layer_norm_quantized(x, w, EPS, bias, quantized), exact_layer(x, w, bias)),
    ):  # fmt: skip
        judge_quantized(got, eager, exact)


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_quantized_residuals(shape, dtype, quantized):
    x, branch = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=5)
    post, w, bias = (weight(shape, True, i) for i in (1, 2, 3))
    total, *got = norm.residual_norm_quantized(strided(x), strided(branch), post, w, EPS, quantized)
    eager = ops.residual_norm_quantized(x, branch, post, w, EPS, quantized)
    judge(total, eager[0], x.double() + exact_rms(branch, post))
    judge_quantized(got, ops.rms_norm_quantized(total, w, EPS, quantized), exact_rms(total, w))
    total, *got = norm.residual_layer_norm_quantized(strided(x), strided(branch), post, w, bias, EPS, quantized)
    eager = ops.residual_layer_norm_quantized(x, branch, post, w, bias, EPS, quantized)
    judge(total, eager[0], x.double() + branch.double() * post.double())
    judge_quantized(got, ops.layer_norm_quantized(total, w, EPS, bias, quantized), exact_layer(total, w, bias))


def test_weight_taken_from_a_table_of_steps():
    shape = (2, 3, 37)
    x, table = draw(*shape, dtype=torch.bfloat16), draw(2, 4, 37)
    w = table.unsqueeze(2).unbind(1)[2]  # [B, 1, D], batch stride 4 * D
    judge(norm.rms_norm(x, w, EPS), ops.rms_norm(x, w, EPS), exact_rms(x, w))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_rms_norm_at_the_ends_of_the_range(scale):
    x, w = scale * draw(1, 3, 37), weight((1, 3, 37), False, 1)
    judge(norm.rms_norm(x, w, EPS), ops.rms_norm(x, w, EPS), exact_rms(x, w))


@pytest.mark.parametrize("shape", [(5, 37), (2, 2, 3, 37)])
def test_other_ranks(shape):
    x, w = draw(*shape), weight((1, 1, 37), False, 1)
    judge(norm.rms_norm(x, w, EPS), ops.rms_norm(x, w, EPS), exact_rms(x, w))


def test_refusals():
    x, w = draw(2, 3, 8), draw(8)
    with pytest.raises(ConfigError, match="16384"):
        norm.rms_norm(draw(1, 1, launch.MAX_WIDTH + 1), draw(launch.MAX_WIDTH + 1), EPS)
    with pytest.raises(ConfigError, match="weight"):
        norm.rms_norm(x, draw(3, 1, 8), EPS)
    with pytest.raises(ConfigError, match="float32"):
        norm.rms_norm(x, w.bfloat16(), EPS)
    with pytest.raises(ConfigError, match="float64"):
        norm.rms_norm(x.double(), w, EPS)
    with pytest.raises(ConfigError, match=r"int8, got torch\.float16"):
        norm.rms_norm_quantized(x, w, EPS, torch.float16)
    with pytest.raises(ConfigError, match="differ"):
        norm.residual_norm(x, x[:, :2], w, w, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 144, 1024, 3072, 3840, 16384])
@pytest.mark.parametrize("count", [1, 37, 4096])
def test_row_tile(count, width, dtype):
    c = launch.row_tile("norm", count, width, dtype)
    assert c.block >= width and c.block < 2 * max(width, 1) and c.rows < 2 * count + 1
    assert 1 <= c.warps <= 16 and c.rows * c.block <= 32 * 32 * c.warps + 2048
