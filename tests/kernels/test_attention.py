"""Attention against a float64 softmax."""

from __future__ import annotations

import pytest
import torch
from oracle import draw, judge

from benches.ops.case import exact_attention, exact_linear_attention
from twinflow_rt import ops
from twinflow_rt.kernels import attention as module
from twinflow_rt.kernels.attention import attention, config, linear_attention, linear_config

DTYPES = (torch.float16, torch.bfloat16)


def operands(b, queries, keys, h, d, dtype):
    """Views of one merged qkv, as the network makes them; q keeps the first rows."""
    qkv = draw(b, keys, 3 * h * d, dtype=dtype)
    q, k, v = qkv.unflatten(-1, (3, h, d)).unbind(2)
    return 2 * q[:, :queries], k, v


def ragged(lengths, dtype):
    """q, k and v, of which what lies beyond a length must not matter, not even NaN; k and v without it; the lengths."""
    q, k, v = operands(2, 37, 199, 2, 64, dtype)
    k, v = k.clone(), v.clone()
    for b, n in enumerate(lengths):
        k[b, n:], v[b, n:] = torch.nan, torch.nan
    return (q, k, v), (k.nan_to_num(0.0), v.nan_to_num(0.0)), torch.tensor(lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 64), (2, 37, 37, 3, 48), (1, 130, 199, 2, 64), (1, 199, 199, 1, 128), (2, 5, 130, 2, 96),
     (1, 3, 70, 1, 256), (1, 64, 128, 1, 64), (2, 0, 8, 1, 64), (1, 17, 760, 1, 36)],
)  # fmt: skip
def test_attention(shape, dtype):
    q, k, v = operands(*shape, dtype)
    judge(attention(q, k, v), ops.attention(q, k, v), exact_attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, (37, 199), (0, 128)])
@pytest.mark.parametrize("shape", [(2, 130, 199, 2, 64), (2, 65, 256, 1, 96), (2, 70, 130, 1, 128), (2, 66, 3, 1, 40)])
def test_specialized(monkeypatch, shape, lengths, dtype):
    monkeypatch.setattr(module.launch, "arch", lambda x: 90)
    monkeypatch.setattr(module, "_attention", None)
    b, queries, keys, h, d = shape
    q, _, _ = operands(b, queries, queries, h, d, dtype)
    _, k, v = operands(b, keys, keys, h, d, dtype)
    count = None if lengths is None else torch.tensor(lengths)
    judge(attention(q, k, v, count), ops.attention(q, k, v, count).nan_to_num(0.0), exact_attention(q, k, v, count))


@pytest.mark.parametrize("what", ["base", "stride", "head dim"])
def test_what_the_memory_accelerator_cannot_address_goes_to_the_plain_kernel(monkeypatch, what):
    monkeypatch.setattr(module.launch, "arch", lambda x: 90)
    monkeypatch.setattr(module, "_specialized", None)
    d = 36 if what == "head dim" else 64
    buffer = draw(1, 70, 3 * 2 * d + (3 if what == "stride" else 8), dtype=torch.float16)
    qkv = buffer[..., 1 if what == "base" else 0 :][..., : 3 * 2 * d]
    q, k, v = qkv.unflatten(-1, (3, 2, d)).unbind(2)
    judge(attention(q, k, v), ops.attention(q, k, v), exact_attention(q, k, v))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 760, 1128, 2, 128), (1, 1128, 1128, 1, 96), (2, 512, 760, 3, 64)])
def test_attention_of_long_sequences(shape, dtype):
    test_attention(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1, 199), (64, 65), (128, 37), (0, 130), (500, 1)])
def test_lengths(lengths, dtype):
    (q, k, v), clean, count = ragged(lengths, dtype)
    judge(attention(q, k, v, count), ops.attention(q, *clean, count), exact_attention(q, *clean, count))


def test_scores_far_from_zero():
    q, k, v = operands(1, 37, 70, 1, 64, torch.float16)
    q, k = 40 * q, 40 * k
    judge(attention(q, k, v), ops.attention(q, k, v), exact_attention(q, k, v))


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_every_tile_gives_the_same_answer(monkeypatch, arch):
    monkeypatch.setattr(module.launch, "arch", lambda x: arch)
    q, k, v = operands(1, 130, 199, 1, 128, torch.float16)
    judge(attention(q, k, v), ops.attention(q, k, v), exact_attention(q, k, v))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 32), (2, 37, 37, 3, 32), (1, 199, 760, 2, 32), (1, 65, 300, 1, 24), (1, 3, 70, 2, 5),
              (2, 0, 8, 1, 32)]
)  # fmt: skip
def test_linear_attention(shape, dtype):
    q, k, v = operands(*shape, dtype)
    judge(linear_attention(q, k, v), ops.linear_attention(q, k, v), exact_linear_attention(q, k, v))


def test_a_query_that_meets_nothing_gives_zero():
    q, k, v = operands(1, 5, 9, 1, 16, torch.float32)
    assert not linear_attention(-q.abs(), k, v).any() and not linear_attention(q, -k.abs(), v).any()


@pytest.mark.parametrize("keys", [0, 1, 256, 1024, 4097, 65536])
def test_linear_config(keys):
    c = linear_config(keys, 32)
    assert c.dim == 32 and c.chunk % c.rows == 0 and keys <= 32 * c.chunk


def test_refusals():
    q, k, v = operands(2, 3, 5, 1, 64, torch.float16)
    with pytest.raises(ValueError, match="float32"):
        attention(q.float(), k.float(), v.float())
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="twice"):
        attention(q, k[:, :4], v)
    with pytest.raises(ValueError, match="elements apart"):
        far = torch.empty_strided((2, 5, 1, 64), (0, 2**24, 0, 1), dtype=torch.float16, device="meta")
        attention.launch(far, far, far)
    with pytest.raises(ValueError, match="lengths"):
        attention(q, k, v, torch.tensor([1, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="up to 32"):
        linear_attention(*(draw(1, 2, 1, 80, dtype=torch.float16),) * 3)
    with pytest.raises(ValueError, match="256"):
        attention(*(draw(1, 2, 1, 300, dtype=torch.float16),) * 3)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("head_dim", [36, 64, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 64, 4096])
def test_config(queries, head_dim, arch):
    c = config(queries, head_dim, torch.bfloat16, arch)
    assert (head_dim <= c.dim and c.queries >= 64 and c.queries == 64) or queries > 64
    tiles = c.queries * c.dim + 2 * c.stages * c.keys * c.dim  # q, and k and v once per stage
    assert 2 * tiles <= (101376 if arch in (86, 89, 120) else 166912 if arch == 80 else 232448)
