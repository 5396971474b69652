"""The native kernels against float64 arithmetic: no further off than twice the eager reference.

The same tests run on the CPU kernels, on the CUDA kernels in an emulator (tests/native/emulator: the
CUDA sources compiled for the CPU) and, where there is one, on a GPU.
"""

from __future__ import annotations

import mmap
import os

import pytest
import torch
import torch.nn.functional as F

from benches.ops.case import SIZES, Sizes, exact_layer, exact_rms, exact_rope, exact_rope_of_halves, judge
from benches.ops.eight_bit_cases import QUANTIZED
from benches.ops.op_cases import cases
from tests.kernels.oracle import draw
from tests.registered import NATIVE, registered
from twinflow_rt import ops
from twinflow_rt.errors import DeviceError
from twinflow_rt.ops import Target, select
from twinflow_rt.ops.implementations import IMPLEMENTATIONS
from twinflow_rt.ops.int4 import quantize_int4
from twinflow_rt.ops.native import decode, library, linear, mlp, norm, rope, sample

DTYPES = (torch.float32, torch.bfloat16)
ODD = Sizes(image=5, text=2, heads=3, head_dim=26, hidden=37, latents=(3, 2, 5), pixels=7)
EPS = 1e-5
# Triton's and the reference's on a GPU
ONLY_CPU = {"group_norm_silu", "grouped_qk_norm_rope_", "linear_w4a8", "linear_w4a16"}


def native(op):
    """An op's native form."""
    return IMPLEMENTATIONS[op]["native"].load()


def check(got, eager, *exact):
    got = tuple(x.cpu() for x in got) if isinstance(got, tuple) else got.cpu()
    problem = judge(got, eager, exact)
    assert problem is None, problem


def formats(at):
    """What rows are quantized to there."""
    return (torch.int8,) if at.place == "cpu" else tuple(QUANTIZED.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SIZES["tiny"], ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("op", NATIVE)
def test_ops(at, op, sizes, dtype):
    (case,) = (c for c in cases(sizes, dtype, "cpu", batch=2) if c.op == op)
    got = native(op)(*at(case.inputs()))
    check(got, getattr(ops.EAGER, op)(*case.inputs()), *case.exact(*case.inputs()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 5, 199), (3, 2, 760), (1, 2, 3840), (1, 1, 8192), (2, 0, 16)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_norms(at, shape, dtype, per_sample):
    x, branch = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=5)
    wide = (shape[0], 1, shape[2]) if per_sample else (shape[2],)
    w, bias = 1 + 0.3 * draw(*wide, seed=1), 0.3 * draw(*wide, seed=2)
    if not x.numel():
        assert norm.rms_norm(*at((x, w, EPS))).shape == norm.layer_norm(*at((x, w, EPS))).shape == shape
        return
    check(norm.rms_norm(*at((x, w, EPS))), ops.rms_norm(x, w, EPS), exact_rms(x, w, EPS))
    for scale, shift in ((w, bias), (None, bias), (None, None)):
        got = norm.layer_norm(*at((x, scale, EPS, shift)))
        check(got, ops.layer_norm(x, scale, EPS, shift), exact_layer(x, scale, EPS, shift))
    total, h = norm.residual_norm(*at((x, branch, w, bias, EPS)))
    check(total, ops.residual_norm(x, branch, w, None, EPS)[0], x.double() + exact_rms(branch, w, EPS))
    check(h, ops.rms_norm(total.cpu(), bias, EPS), exact_rms(total.cpu(), bias, EPS))  # of the sum as stored
    alone, nothing = norm.residual_norm(*at((x, branch, w, None, EPS)))
    assert nothing is None and torch.equal(alone, total)
    for gate in (bias, None):
        total, h = norm.residual_layer_norm(*at((x, branch, gate, w, None, EPS)))
        gated = branch.double() if gate is None else branch.double() * gate.double()
        check(total, ops.residual_layer_norm(x, branch, gate, None, None, EPS)[0], x.double() + gated)
        check(h, ops.layer_norm(total.cpu(), w, EPS), exact_layer(total.cpu(), w, EPS, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 24, 64, 96, 128, 192, 256])
def test_rope_head_dims(at, head_dim, dtype):
    qkv, w = draw(1, 2, 3 * 2 * head_dim, dtype=dtype), 1 + 0.3 * draw(head_dim)
    angle = 6 * draw(1, 2, head_dim // 2)
    tables = (w, 2 * w, angle.cos(), angle.sin())
    q, k, v = qkv.unflatten(-1, (3, 2, head_dim)).unbind(-3)
    exact = [exact_rope(x, t, *tables[2:], EPS) for x, t in ((q, w), (k, 2 * w))]
    got = rope.qk_norm_rope(*at((qkv.clone(), *tables, 2, EPS)))
    check(got, ops.qk_norm_rope(qkv, *tables, 2, EPS), *exact, v.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 24, 64, 128, 256, 384])
@pytest.mark.parametrize("normed", [True, False])
def test_rope_of_groups(head_dim, dtype, normed):
    """Strided tokens, heads in groups, angles per sample: q and k are rewritten, v and what lies between stays."""
    buffer = torch.full((2, 9, 7 * head_dim + 8), torch.nan, dtype=dtype)
    qkv = buffer[:, 1::2, 8:]
    qkv.copy_(draw(2, 4, 7 * head_dim, dtype=dtype))
    source, angle = qkv.clone(), 6 * draw(2, 4, head_dim // 2)
    weights = (1 + 0.3 * draw(head_dim), 1 + 0.3 * draw(head_dim, seed=1)) if normed else (None, None)
    tables = (*weights, angle.cos(), angle.sin())
    q, k, v = source.unflatten(-1, (7, head_dim)).transpose(1, 2).split((3, 2, 2), 1)
    exact = [exact_rope_of_halves(x, w, *tables[2:], EPS) for x, w in zip((q, k), weights, strict=True)]
    got = rope.grouped_qk_norm_rope(qkv, *tables, 3, 2, EPS)
    check(got, ops.grouped_qk_norm_rope(source, *tables, 3, 2, EPS), *exact, v.double())
    assert got[0].data_ptr() == qkv.data_ptr()
    qkv[:] = torch.nan
    assert buffer.isnan().all()


def test_rope_in_place_between_gaps(at):
    """Strided tokens, angles per sample: q and k are rewritten, v and what lies between stays."""
    for dtype, head_dim in ((torch.bfloat16, 16), (torch.float32, 6)):
        buffer = torch.full((2, 9, 3 * 2 * head_dim + 8), torch.nan, dtype=dtype)
        view = buffer[:, 1::2, 8:]
        view.copy_(draw(2, 4, 3 * 2 * head_dim, dtype=dtype))
        source, angle = view.clone(), 6 * draw(2, 4, head_dim // 2)
        tables = (1 + draw(head_dim), 1 + draw(head_dim, seed=1), angle.cos(), angle.sin(), 2, EPS)
        eager = ops.qk_norm_rope(source, *tables)
        on_device = at(buffer)
        rope.qk_norm_rope(on_device[:, 1::2, 8:], *at(tables))
        result = on_device.cpu()
        for y, reference in zip(result[:, 1::2, 8:].unflatten(-1, (3, 2, -1)).unbind(-3), eager, strict=True):
            torch.testing.assert_close(y, reference)
        result[:, 1::2, 8:] = torch.nan
        assert result.isnan().all()


def test_strided_rows_slices_and_any_rank(at):
    wide, w = at(draw(4, 9, 64)), at(1 + draw(64))
    views = wide[..., :32], wide[:, :5, 32:], wide[..., 5:38], wide.transpose(0, 1)[..., ::2], wide[0], wide[:, :, None]
    for x in views:
        weight = w[: x.shape[-1]]
        torch.testing.assert_close(norm.rms_norm(x, weight, EPS), ops.rms_norm(x, weight, EPS))
        torch.testing.assert_close(norm.layer_norm(x, None, EPS), ops.layer_norm(x, None, EPS))
    x, branch, each = wide[:, 2:7, :32], wide[:, :5, 32:], at(1 + draw(4, 3, 1, 32)).unbind(1)
    got, eager = norm.residual_norm(x, branch, *each[:2], EPS), ops.residual_norm(x, branch, *each[:2], EPS)
    torch.testing.assert_close(got, eager)
    got, eager = (f.residual_layer_norm(x, branch, *each, EPS) for f in (norm, ops))
    torch.testing.assert_close(got, eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 37, 19), (3, 1, 8, 64), (2, 3, 16, 64)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_to_uint8_is_exact(at, shape, dtype, layout):
    image = (1.5 * draw(*shape, dtype=dtype)).contiguous(memory_format=layout)
    assert torch.equal(decode.to_uint8(at(image)).cpu(), ops.to_uint8(image))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (37,), (2, 3, 5, 7), (0, 4)])
def test_x0_project(at, dtype, shape):
    x, v = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=3)
    if x.numel():
        check(sample.x0_project(*at((x, v, 0.7))), ops.x0_project(x, v, 0.7), x.double() - 0.7 * v.double())
    assert torch.equal(sample.x0_project(*at((x, v))).cpu(), ops.x0_project(x, v))


def test_activations_at_the_ends_of_the_range(at):
    x = torch.tensor([[-1e30, -200.0, -88.5, 88.5, 1e30, float("nan"), 1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(mlp.swiglu(at(x)).cpu(), ops.swiglu(x), equal_nan=True, atol=1e-30, rtol=1e-6)
    x = torch.tensor([[-1e9, -200.0, -9.0, -1e-20, 0.0, 1e-20, 9.0, 1e9, float("nan")]])
    # 1 + tanh cancels: the reference has 0 where the value is 1e-28
    torch.testing.assert_close(mlp.gelu_tanh(at(x)).cpu(), ops.gelu_tanh(x), equal_nan=True, atol=1e-27, rtol=1e-6)


@pytest.mark.parametrize("place", ["cpu", "emulated"])
def test_offsets_beyond_32_bits(place, request, monkeypatch):
    """Two samples more than 2^31 elements apart, in memory that is reserved and hardly touched."""
    if place == "emulated":
        kernels = request.getfixturevalue("emulated")
        monkeypatch.setattr(library, "load", lambda device: kernels)
    batch, dim = 2**31 + 64, 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (batch + 2 * 3 * dim), flags=flags), dtype=torch.bfloat16)
    x = memory.as_strided((2, 2, 3 * dim), (batch, 3 * dim, 1))
    x.copy_(draw(2, 2, 3 * dim))
    dense, w = x.contiguous(), 1 + draw(3 * dim)
    for got, eager in zip(linear.quantize_rows(x, torch.int8), ops.quantize_rows(dense, torch.int8), strict=True):
        assert torch.equal(got, eager)
    angle = draw(1, 2, dim // 2)
    torch.testing.assert_close(norm.rms_norm(x, w, EPS), ops.rms_norm(dense, w, EPS))
    torch.testing.assert_close(norm.layer_norm(x, w, EPS), ops.layer_norm(dense, w, EPS))
    for f in ("residual_norm", "residual_layer_norm"):
        rest = (w, w, EPS) if f == "residual_norm" else (w, w, w, EPS)
        torch.testing.assert_close(getattr(norm, f)(x, x, *rest), getattr(ops, f)(dense, dense, *rest))
    tables = (w[:dim], w[:dim], angle.cos(), angle.sin(), 1, EPS)
    torch.testing.assert_close(rope.qk_norm_rope(x, *tables), ops.qk_norm_rope(dense, *tables))
    image = memory.as_strided((2, 3, 2, 8), (batch, 16, 8, 1))
    assert torch.equal(decode.to_uint8(image), ops.to_uint8(image.contiguous()))


def test_wrong_arguments_are_refused_before_the_kernel():
    x, w = draw(2, 3, 8), 1 + draw(8)
    for call, error in [
        (lambda: norm.rms_norm(x, w[:7], EPS), ValueError),
        (lambda: norm.rms_norm(x, w.expand(3, 1, 8), EPS), ValueError),
        (lambda: norm.rms_norm(x[0], draw(3, 1, 8), EPS), ValueError),  # one weight a sample: of [B, S, D] only
        (lambda: norm.rms_norm(x, w.double(), EPS), TypeError),
        (lambda: norm.rms_norm(x.half(), w, EPS), TypeError),
        (lambda: norm.layer_norm(x, w, EPS, w[:7]), ValueError),
        (lambda: norm.residual_norm(x, x[:1], w, w, EPS), ValueError),
        (lambda: norm.residual_layer_norm(x, x.bfloat16(), w, w, w, EPS), ValueError),
        (lambda: mlp.swiglu(draw(2, 7)), ValueError),
        (lambda: rope.qk_norm_rope(x, w, w, x, x, 1, EPS), ValueError),
        (lambda: rope.qk_norm_rope(x, w[:2], w[:2].double(), *[draw(1, 3, 1)] * 2, 1, EPS), ValueError),
        (lambda: rope.grouped_qk_norm_rope(x, None, None, *[draw(1, 3, 1)] * 2, 3, 1, EPS), ValueError),
        (lambda: rope.grouped_qk_norm_rope(x, w[:4], None, *[draw(1, 3, 1)] * 2, 2, 1, EPS), ValueError),
        (lambda: rope.grouped_qk_norm_rope(x, w[:2].double(), None, *[draw(1, 3, 1)] * 2, 2, 1, EPS), TypeError),
        (lambda: rope.grouped_qk_norm_rope(x, None, None, *[draw(3, 3, 1)] * 2, 2, 1, EPS), ValueError),
        (lambda: rope.grouped_qk_norm_rope(x, None, None, *[draw(1, 3, 1).double()] * 2, 2, 1, EPS), TypeError),
        (lambda: rope.joint_qk_norm_rope((x, x[:1]), (w, w), (w, w), *[draw(2, 6, 8)] * 2, 1, EPS), ValueError),
        (lambda: sample.x0_project(x, x.bfloat16()), ValueError),
    ]:
        with pytest.raises(error):
            call()


def test_ops_keep_torchs_rules(at):
    """Schemas, fakes, mutation and dynamic shapes as declared: all that is registered."""
    o, w, angle, x = torch.ops.twinflow, 1 + draw(16), draw(1, 3, 4), draw(2, 3, 16)
    checked = set()

    def check(op, *args):
        torch.library.opcheck(op, at(args))
        checked.add(op.name().split("::")[1])

    check(o.rms_norm.default, x, w, EPS)
    check(o.layer_norm.default, x, w, EPS, None)
    check(o.residual_norm.default, x, draw(2, 3, 16, seed=1), w, w, EPS)
    check(o.residual_norm.default, x, draw(2, 3, 16, seed=1), w, None, EPS)
    check(o.residual_layer_norm.default, x, draw(2, 3, 16, seed=1), w, None, w, EPS)
    check(o.x0_project.default, x, draw(2, 3, 16, seed=1), 0.5)
    check(o.swiglu.default, x)
    check(o.gelu_tanh.default, x)
    tables = (draw(8), draw(8, seed=1), angle.cos(), angle.sin())
    check(o.qk_norm_rope_.default, draw(2, 3, 48), *tables, 2, EPS)
    streams = [draw(2, 2, 48), draw(2, 1, 48)]
    check(o.joint_qk_norm_rope.default, streams, [draw(8)] * 2, [draw(8, seed=1)] * 2, *tables[2:], 2, EPS)
    check(o.to_uint8.default, draw(1, 3, 4, 4))
    rows = torch.randint(-9, 9, (2, 3, 64), dtype=torch.int8)
    native("linear_w4a8")  # which registers it
    if at.place == "cpu":
        check(o.grouped_qk_norm_rope_.default, draw(2, 3, 40), None, draw(8), *tables[2:], 3, 1, EPS)
        check(o.linear_w4a8.default, rows, draw(2, 3, 1), *quantize_int4(draw(5, 64), 64), None, torch.bfloat16)
        check(o.linear_w4a16.default, draw(2, 3, 64), *quantize_int4(draw(5, 64), 32), draw(5))
        check(o.group_norm_silu.default, draw(1, 4, 3, 3), 2, draw(4), draw(4), EPS)
    check(o.linear_quantized.default, rows, draw(2, 3, 1), rows[0], draw(3, 1), None, torch.bfloat16)
    for to in formats(at):
        check(o.quantize_rows.default, x, to)
        check(o.rms_norm_quantized.default, x, w, EPS, to)
        check(o.layer_norm_quantized.default, x, w, EPS, None, to)
        check(o.residual_norm_quantized.default, x, draw(2, 3, 16, seed=1), w, w, EPS, to)
        check(o.residual_layer_norm_quantized.default, x, draw(2, 3, 16, seed=1), w, None, w, EPS, to)
        check(o.swiglu_quantized.default, x, to)
        check(o.gelu_tanh_quantized.default, x, to)
    assert checked == registered("native") - (set() if at.place == "cpu" else ONLY_CPU)


def test_every_thread_count_gives_the_same_bits():
    x, w, before = draw(3, 37, 199), 1 + draw(199), torch.get_num_threads()
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append((norm.rms_norm(x, w, EPS), norm.layer_norm(x, w, EPS)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_selection_states_its_refusals(monkeypatch):
    table, _ = select(Target("cpu", torch.float32))
    assert all(getattr(table, op) is native(op) for op in NATIVE)
    for target, reason in [
        (Target("cpu", torch.float16), "not float16"),
        (Target("cpu", torch.float32, training=True), "no gradient"),
    ]:
        table, choices = select(target)
        choice = next(c for c in choices if c.op == "rms_norm")
        assert (choice.chosen, table.rms_norm) == ("eager", ops.rms_norm)
        assert reason in dict(choice.refused)["native"]
    rope_refuses = IMPLEMENTATIONS["qk_norm_rope"]["cuda"].refuses
    assert "head dims up to 256" in rope_refuses(Target("cuda", torch.float32, head_dim=320))
    monkeypatch.setattr(library, "load", lambda device: "the native extension is not built here (test)")
    _, choices = select(Target("cpu", torch.float32))
    assert "not built" in str(choices)
    with pytest.raises(DeviceError, match="not built"):
        norm.rms_norm(draw(1, 1, 8), draw(8), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, groups", [((1, 2, 1, 1), 1), ((2, 6, 5, 7), 3), ((1, 16, 64, 64), 8), ((2, 320, 3, 9), 32)]
)
@pytest.mark.parametrize("mean", [0, 50])
def test_group_norm_silu(shape, groups, mean, dtype):
    x = (draw(*shape) + mean).to(dtype)
    weight, bias = (1 + 0.3 * draw(shape[1], seed=1)).to(dtype), draw(shape[1], seed=2).to(dtype)
    exact = F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double(), EPS))
    for layout in (torch.contiguous_format, torch.channels_last):
        got = norm.group_norm_silu(x.contiguous(memory_format=layout), groups, weight, bias, EPS)
        assert got.is_contiguous(memory_format=torch.channels_last)
        check(got, ops.group_norm_silu(x, groups, weight, bias, EPS), exact)


def test_no_pixels_and_no_numbers_in_group_norm_silu():
    w = torch.ones(4)
    assert norm.group_norm_silu(draw(0, 4, 2, 2), 2, w, w, EPS).shape == (0, 4, 2, 2)
    x = draw(2, 4, 6, 6)
    x[0, 1, 2, 3] = torch.nan
    got = norm.group_norm_silu(x, 2, w, w, EPS)
    assert got[0, :2].isnan().all() and got[0, 2:].isfinite().all() and got[1].isfinite().all()


def test_threads_are_released_and_come_back():
    """A team that waits for its next kernel slows all others down (twinflow_rt.h); the next kernel starts a new one."""
    kernels, x, w = library.load("cpu"), draw(64, 40, 64), 1 + draw(64)
    before, count = norm.rms_norm(x, w, EPS), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        norm.rms_norm(x, w, EPS)
        tasks = lambda: len(os.listdir("/proc/self/task"))
        busy = tasks()
        assert kernels.release_threads()
        assert not os.path.isdir("/proc/self/task") or tasks() <= busy - 2
        assert torch.equal(norm.rms_norm(x, w, EPS), before)
    finally:
        torch.set_num_threads(count)
