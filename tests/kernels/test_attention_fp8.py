"""Attention with float8 scores against a float64 softmax of the quantized operands, and of the given ones."""

from __future__ import annotations

import pytest
import torch
from oracle import judge
from test_attention import DTYPES, operands, ragged

from benches.ops.case import exact_attention
from twinflow_rt import ops
from twinflow_rt.kernels import attention_fp8 as module
from twinflow_rt.kernels.attention_fp8 import FP8, attention_fp8, config


def defined(q, k, v, lengths=None):
    """The definition in float64: what is quantized is what is multiplied."""
    q, k = (values.double() * scales.double() for values, scales in (ops.quantize_rows(x, FP8) for x in (q, k)))
    return exact_attention(q, k, v, lengths)


def test_heads_are_quantized_as_rows():
    q, k, _ = operands(2, 37, 199, 3, 48, torch.bfloat16)
    for x in (q, k):
        values, scales = module._heads(x, 64)
        n = x.shape[1]
        expected = ops.quantize_rows(x.transpose(1, 2), FP8)
        assert values.shape == (2, 3, 256 if n == 199 else 128, 64) and not values[..., 48:].float().any()
        assert torch.equal(values[:, :, :n, :48].float(), expected[0].float()) and not values[:, :, n:].float().any()
        assert torch.equal(scales[:, :, :n, None], expected[1]) and scales.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 64), (2, 37, 37, 3, 48), (1, 130, 199, 2, 64), (1, 199, 199, 1, 128), (2, 5, 130, 2, 96),
     (1, 3, 70, 1, 256), (1, 64, 128, 1, 64), (2, 0, 8, 1, 64), (1, 3, 0, 1, 64), (1, 17, 760, 1, 36)],
)  # fmt: skip
def test_attention_fp8(shape, dtype):
    q, k, v = operands(*shape[:2], max(shape[1:3]), *shape[3:], dtype)
    k, v = k[:, : shape[2]], v[:, : shape[2]]
    judge(attention_fp8(q, k, v), ops.attention_fp8(q, k, v), defined(q, k, v))


@pytest.mark.parametrize("lengths", [(1, 199), (128, 37), (0, 130), (500, 1)])
def test_lengths(lengths):
    (q, k, v), clean, count = ragged(lengths, torch.bfloat16)
    eager = ops.attention_fp8(q, *clean, count)
    judge(attention_fp8(q, k, v, count), eager, defined(q, *clean, count))


def test_error_of_the_scores_is_that_of_4_significant_bits():
    """Against what was given: scores of unit variance are off by about 2^-4 / sqrt(3) * sqrt(2), so outputs too."""
    q, k, v = operands(1, 130, 199, 2, 64, torch.bfloat16)
    truth = exact_attention(q / 2, k, v)
    error = float((attention_fp8(q / 2, k, v).double() - truth).norm() / truth.norm())
    assert 1e-3 < error < 0.06, error


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
def test_every_tile_gives_the_same_answer(monkeypatch, arch):
    monkeypatch.setattr(module.launch, "arch", lambda x: arch)
    q, k, v = operands(1, 130, 199, 1, 128, torch.float16)
    judge(attention_fp8(q, k, v), ops.attention_fp8(q, k, v), defined(q, k, v))


def test_tokens_of_any_size():
    """A scale per token and head: sizes from 1e-6 to 1e6 cost no accuracy, and rows of zeros are zeros."""
    q, k, v = operands(1, 37, 70, 2, 64, torch.bfloat16)
    q, k = q * torch.logspace(-6, 1, 37)[:, None, None].bfloat16(), k * torch.logspace(-4, 1, 70)[:, None, None]
    q[:, 3], k = 0, k.bfloat16()
    judge(attention_fp8(q, k, v), ops.attention_fp8(q, k, v), defined(q, k, v))


def test_refusals():
    q, k, v = operands(2, 3, 5, 1, 64, torch.float16)
    with pytest.raises(ValueError, match="float32"):
        attention_fp8(q.float(), k.float(), v.float())
    with pytest.raises(ValueError, match="twice"):
        attention_fp8(q, k[:, :4], v)
    with pytest.raises(ValueError, match=r"compute capability 8\.9"):
        config(64, 64, torch.bfloat16, 86)
    with pytest.raises(ValueError, match="256"):
        config(64, 300, torch.bfloat16, 90)


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
@pytest.mark.parametrize("head_dim", [36, 64, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 64, 4096])
def test_config(queries, head_dim, arch):
    c = config(queries, head_dim, torch.bfloat16, arch)
    assert head_dim <= c.dim and (c.queries == 64 or queries > 64)
    assert module.KEY_MULTIPLE % c.queries == 0 == module.KEY_MULTIPLE % c.keys  # tiles read no row that is not there
    tiles = c.queries * c.dim + 3 * c.stages * c.keys * c.dim  # q; k in bytes and v in twice as many, per stage
    assert tiles <= (101376 if arch in (89, 120) else 232448)
