"""Row norms against float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, QUANTIZED, draw, judge, judge_quantized, strided

from benches.ops.case import exact_layer, exact_rms
from twinflow_rt import ops
from twinflow_rt.kernels import launch, norm

SHAPES = ((1, 1, 1), (2, 5, 37), (3, 3, 199), (2, 3, 760), (1, 5, 1128), (1, 3, 144), (2, 0, 16), (1, 1, 5000))
EPS = 1e-5


def weight(shape, per_sample, seed):
    b, _, d = shape
    return 1 + 0.3 * (draw(b, 1, d, seed=seed) if per_sample else draw(d, seed=seed))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype, per_sample):
    x, w = draw(*shape, dtype=dtype), weight(shape, per_sample, 1)
    judge(norm.rms_norm(strided(x), w, EPS), ops.rms_norm(x, w, EPS), exact_rms(x, w, EPS))


@pytest.mark.parametrize("weighted, biased", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape, dtype, weighted, biased):
    x = (draw(*shape, dtype=torch.float32) + 3).to(dtype)
    w = weight(shape, True, 1) if weighted else None
    bias = weight(shape, True, 2) if biased else None
    judge(norm.layer_norm(strided(x), w, EPS, bias), ops.layer_norm(x, w, EPS, bias), exact_layer(x, w, EPS, bias))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_norm(shape, dtype, per_sample):
    x, branch = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=5)
    post, pre = weight(shape, per_sample, 1), weight(shape, per_sample, 2)
    eager = ops.residual_norm(x, branch, post, pre, EPS)
    got = norm.residual_norm(strided(x), strided(branch), post, pre, EPS)
    judge(got[0], eager[0], x.double() + exact_rms(branch, post, EPS))
    judge(got[1], ops.rms_norm(got[0], pre, EPS), exact_rms(got[0], pre, EPS))
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
    judge(got[1], ops.layer_norm(got[0], w, EPS, bias), exact_layer(got[0], w, EPS, bias))


ROWS = ((2, 5, 37), (3, 3, 199), (1, 2, 1128), (2, 0, 16), (1, 1, 1))


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_quantized_norms(shape, dtype, quantized):
    x, w, bias = (draw(*shape) + 1).to(dtype), weight(shape, True, 1), weight(shape, True, 2)
    for got, eager, exact in (
        (norm.rms_norm_quantized(strided(x), w, EPS, quantized),
         ops.rms_norm_quantized(x, w, EPS, quantized), exact_rms(x, w, EPS)),
        (norm.layer_norm_quantized(strided(x), w, EPS, bias, quantized),
         ops.layer_norm_quantized(x, w, EPS, bias, quantized), exact_layer(x, w, EPS, bias)),
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
    judge(total, eager[0], x.double() + exact_rms(branch, post, EPS))
    judge_quantized(got, ops.rms_norm_quantized(total, w, EPS, quantized), exact_rms(total, w, EPS))
    total, *got = norm.residual_layer_norm_quantized(strided(x), strided(branch), post, w, bias, EPS, quantized)
    eager = ops.residual_layer_norm_quantized(x, branch, post, w, bias, EPS, quantized)
    judge(total, eager[0], x.double() + branch.double() * post.double())
    judge_quantized(got, ops.layer_norm_quantized(total, w, EPS, bias, quantized), exact_layer(total, w, EPS, bias))


def test_weight_taken_from_a_table_of_steps():
    shape = (2, 3, 37)
    x, table = draw(*shape, dtype=torch.bfloat16), draw(2, 4, 37)
    w = table.unsqueeze(2).unbind(1)[2]  # [B, 1, D], batch stride 4 * D
    judge(norm.rms_norm(x, w, EPS), ops.rms_norm(x, w, EPS), exact_rms(x, w, EPS))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_rms_norm_at_the_ends_of_the_range(scale):
    x, w = scale * draw(1, 3, 37), weight((1, 3, 37), False, 1)
    judge(norm.rms_norm(x, w, EPS), ops.rms_norm(x, w, EPS), exact_rms(x, w, EPS))


@pytest.mark.parametrize("shape", [(5, 37), (2, 2, 3, 37)])
def test_other_ranks(shape):
    x, w = draw(*shape), weight((1, 1, 37), False, 1)
    judge(norm.rms_norm(x, w, EPS), ops.rms_norm(x, w, EPS), exact_rms(x, w, EPS))


def test_refusals():
    x, w = draw(2, 3, 8), draw(8)
    with pytest.raises(ValueError, match="16384"):
        norm.rms_norm(draw(1, 1, launch.MAX_WIDTH + 1), draw(launch.MAX_WIDTH + 1), EPS)
    with pytest.raises(ValueError, match="weight"):
        norm.rms_norm(x, draw(3, 1, 8), EPS)
    with pytest.raises(ValueError, match="float32"):
        norm.rms_norm(x, w.bfloat16(), EPS)
    with pytest.raises(ValueError, match="float64"):
        norm.rms_norm(x.double(), w, EPS)
    with pytest.raises(ValueError, match=r"int8, got torch\.float16"):
        norm.rms_norm_quantized(x, w, EPS, torch.float16)
    with pytest.raises(ValueError, match="differ"):
        norm.residual_norm(x, x[:, :2], w, w, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 144, 1024, 3072, 3840, 16384])
@pytest.mark.parametrize("count", [1, 37, 4096])
def test_row_tile(count, width, dtype):
    c = launch.row_tile("norm", count, width, dtype)
    assert c.block >= width and c.block < 2 * max(width, 1) and c.rows < 2 * count + 1
    assert 1 <= c.warps <= 16 and c.rows * c.block <= 32 * 32 * c.warps + 2048


# -- of images ----------------------------------------------------------------------------------------------


def exact_group_norm(x, groups, weight, bias, eps):
    return F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double(), eps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, groups",
    [((1, 2, 1, 1), 1), ((2, 6, 5, 7), 3), ((1, 36, 37, 3), 4), ((2, 64, 8, 8), 32), ((1, 5, 1, 199), 5),
     ((0, 4, 2, 2), 2)],
)  # fmt: skip
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_silu(shape, groups, dtype, channels_last):
    x, weight, bias = (draw(*shape) + 2).to(dtype), 1 + 0.3 * draw(shape[1], seed=1), draw(shape[1], seed=2)
    source = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    got = norm.group_norm_silu(source, groups, weight.to(dtype), bias.to(dtype), 1e-6)
    assert got.is_contiguous(memory_format=torch.channels_last)
    arguments = (x, groups, weight.to(dtype), bias.to(dtype), 1e-6)
    judge(got, ops.group_norm_silu(*arguments), exact_group_norm(*arguments))


@pytest.mark.parametrize("chunks", [1, 2, 512])
def test_group_norm_merges_chunks_of_far_values(monkeypatch, chunks):
    """A large mean, drifting over the image: sums of squares would lose it."""
    monkeypatch.setattr(norm, "MAX_CHUNKS", chunks)
    x = draw(1, 8, 40, 41) + 3000 + 50 * torch.arange(40.0).view(1, 1, 40, 1)
    arguments = (x, 2, draw(8, seed=1), draw(8, seed=2), 1e-6)
    judge(norm.group_norm_silu(*arguments), ops.group_norm_silu(*arguments), exact_group_norm(*arguments))


def test_group_norm_of_a_crop():
    wide = draw(2, 9, 11, 24).permute(0, 3, 1, 2)
    x = wide[:, :16, 1:8, 2:]
    arguments = (x, 4, draw(16, seed=1), draw(16, seed=2), 1e-6)
    judge(norm.group_norm_silu(*arguments), ops.group_norm_silu(*arguments), exact_group_norm(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 6, 5, 7), (1, 37, 3, 19), (1, 760, 2, 2), (0, 4, 2, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_rms_norm_silu(shape, dtype, channels_last):
    x, weight = 3 * draw(*shape, dtype=dtype), 1 + 0.3 * draw(shape[1], seed=1)
    source = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    got = norm.rms_norm_silu(source, weight, 1e-6)
    assert got.is_contiguous(memory_format=torch.channels_last)
    v = x.double()
    scaled = v * (v.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight.double().view(-1, 1, 1)
    judge(got, ops.rms_norm_silu(x, weight, 1e-6), F.silu(scaled))


def test_rms_norm_silu_of_a_crop():
    x, weight = draw(2, 9, 11, 24).permute(0, 3, 1, 2)[:, :16, 1:8, 2:], draw(16)
    torch.testing.assert_close(norm.rms_norm_silu(x, weight, 1e-6), ops.rms_norm_silu(x, weight, 1e-6))


def test_refusals_of_images():
    x, w = draw(1, 6, 4, 4), draw(6)
    with pytest.raises(ValueError, match="multiple of the 4 groups"):
        norm.group_norm_silu(x, 4, w, w, 1e-6)
    with pytest.raises(ValueError, match="weight and bias"):
        norm.group_norm_silu(x, 3, w[:3], w, 1e-6)
    with pytest.raises(ValueError, match="float32"):
        norm.rms_norm_silu(x, w[:3], 1e-6)


@pytest.mark.parametrize("pixels, channels", [(1, 3), (37, 128), (2**20, 128), (2**16, 512), (1328 * 1328, 96)])
def test_group_config(pixels, channels):
    c = norm.group_config(pixels, channels)
    assert c.chunk % c.rows == 0 and -(-pixels // c.chunk) <= norm.MAX_CHUNKS
    assert channels <= c.block < 2 * channels + 1 and c.rows * c.block <= 4096
