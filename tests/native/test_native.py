"""Native CPU kernels against float64 arithmetic: no further off than twice the eager reference."""

from __future__ import annotations

import pytest
import torch

from twinflow_rt import native, ops
from twinflow_rt.errors import DeviceError
from twinflow_rt.ops.select import Target, select

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1, 8), (2, 37, 199), (3, 5, 760), (1, 33, 1128), (2, 0, 16))


@pytest.fixture(autouse=True)
def built(nan_poison):
    if reason := native.unavailable_reason():
        pytest.fail(reason)  # `make test` builds it: absence is a defect, not a reason to skip


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def judge(got, eager, exact):
    """The error rule, over all elements; a floor of one rounding for results the reference has exact."""
    assert got.dtype == eager.dtype and got.shape == exact.shape and not got.isnan().any()
    if not exact.numel():
        return
    worst = lambda x: (x.double() - exact).abs().max().item()
    floor = torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert worst(got) <= 2 * worst(eager) + floor / 2


def weights(shape, per_sample, seed):
    b, _, d = shape
    return 1 + 0.3 * (draw(b, 1, d, seed=seed) if per_sample else draw(d, seed=seed))


def exact_rms(x, w, eps):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_rms_norm(shape, dtype, per_sample):
    x, w = draw(*shape, dtype=dtype), weights(shape, per_sample, 1)
    judge(native.rms_norm(x, w, 1e-5), ops.rms_norm(x, w, 1e-5), exact_rms(x, w, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_residual_norm(shape, dtype, per_sample):
    x, branch = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=5)
    post, pre = weights(shape, per_sample, 1), weights(shape, per_sample, 2)
    total = x.double() + exact_rms(branch, post, 1e-5)
    got, eager = native.residual_norm(x, branch, post, pre, 1e-5), ops.residual_norm(x, branch, post, pre, 1e-5)
    judge(got[0], eager[0], total)
    judge(got[1], eager[1], exact_rms(eager[0], pre, 1e-5))
    alone, nothing = native.residual_norm(x, branch, post, None, 1e-5)
    assert nothing is None and torch.equal(alone, got[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 37, 341, 512])
def test_swiglu(dtype, hidden):
    x = 4 * draw(3, 7, 2 * hidden, dtype=dtype)
    a, b = x.double().chunk(2, -1)
    judge(native.swiglu(x), ops.swiglu(x), a * a.sigmoid() * b)


def test_swiglu_at_the_ends_of_the_range():
    x = torch.tensor([[-1e30, -200.0, -88.5, 88.5, 1e30, float("nan"), 1, 1, 1, 1, 1, 1]])
    got = native.swiglu(x)
    torch.testing.assert_close(got, ops.swiglu(x), equal_nan=True, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(1, 1, 1, 2), (2, 37, 3, 24), (3, 5, 2, 64), (1, 33, 4, 128), (2, 0, 2, 8)])
@pytest.mark.parametrize("shared", [False, True])
def test_qk_norm_rope(case, dtype, shared):
    b, s, h, d = case
    qkv, wq, wk = draw(b, s, 3 * h * d, dtype=dtype), 1 + 0.3 * draw(d), 1 + 0.3 * draw(d, seed=1)
    angle = 6 * draw(1 if shared else b, s, d // 2)
    cos, sin = angle.cos(), angle.sin()
    eager = ops.qk_norm_rope(qkv.clone(), wq, wk, cos, sin, h, 1e-5)
    values = qkv.double().unflatten(-1, (3, h, d)).unbind(-3)
    got = native.qk_norm_rope(qkv.clone(), wq, wk, cos, sin, h, 1e-5)
    for i, w in enumerate((wq, wk)):
        x = torch.view_as_complex(exact_rms(values[i], w, 1e-5).unflatten(-1, (-1, 2)).contiguous())
        turn = torch.complex(cos.double(), sin.double()).unsqueeze(-2)
        judge(got[i], eager[i], torch.view_as_real(x * turn).flatten(-2))
    assert torch.equal(got[2], eager[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 37, 19), (3, 1, 8, 64)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_to_uint8_is_exact(shape, dtype, layout):
    image = (1.5 * draw(*shape, dtype=dtype)).contiguous(memory_format=layout)
    assert torch.equal(native.to_uint8(image), ops.to_uint8(image))


def test_strided_rows_and_slices():
    wide, w = draw(4, 9, 64), 1 + draw(32)
    for x in (wide[..., :32], wide[:, :5, 32:], wide.transpose(0, 1)[..., ::2]):
        torch.testing.assert_close(native.rms_norm(x, w, 1e-5), ops.rms_norm(x, w, 1e-5))
    x, branch, each = wide[:, 2:7, :32], wide[:, :5, 32:], 1 + draw(4, 1, 32)
    got, eager = native.residual_norm(x, branch, each, w, 1e-5), ops.residual_norm(x, branch, each, w, 1e-5)
    torch.testing.assert_close(got, eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (37,), (2, 3, 5, 7), (0, 4)])
def test_x0_project(dtype, shape):
    x, v = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=3)
    judge(native.x0_project(x, v, 0.7), ops.x0_project(x, v, 0.7), x.double() - 0.7 * v.double())
    assert torch.equal(native.x0_project(x, v), ops.x0_project(x, v))


def test_wrong_arguments_are_refused_before_the_kernel():
    x, w = draw(2, 3, 8), 1 + draw(8)
    for call, error in [
        (lambda: native.rms_norm(x, w[:7], 1e-5), ValueError),
        (lambda: native.rms_norm(x, w.expand(3, 1, 8), 1e-5), ValueError),
        (lambda: native.rms_norm(x, w.double(), 1e-5), TypeError),
        (lambda: native.rms_norm(x.half(), w, 1e-5), TypeError),
        (lambda: native.residual_norm(x, x[:1], w, w, 1e-5), ValueError),
        (lambda: native.swiglu(draw(2, 7)), ValueError),
        (lambda: native.qk_norm_rope(x, w, w, x, x, 1, 1e-5), ValueError),
        (lambda: native.x0_project(x, x.bfloat16()), ValueError),
    ]:
        with pytest.raises(error):
            call()


def test_ops_keep_torchs_rules():
    """Schemas, fakes and mutation as declared."""
    o, w, angle = torch.ops.twinflow, 1 + draw(16), draw(1, 3, 4)
    check = lambda op, *args: torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    check(o.rms_norm.default, draw(2, 3, 16), w, 1e-5)
    check(o.residual_norm.default, draw(2, 3, 16), draw(2, 3, 16, seed=1), w, w, 1e-5)
    check(o.residual_norm.default, draw(2, 3, 16), draw(2, 3, 16, seed=1), w, None, 1e-5)
    check(o.x0_project.default, draw(2, 3, 16), draw(2, 3, 16, seed=1), 0.5)
    check(o.swiglu.default, draw(2, 3, 16))
    check(o.qk_norm_rope_.default, draw(2, 3, 48), draw(8), draw(8), angle.cos(), angle.sin(), 2, 1e-5)
    check(o.to_uint8.default, draw(1, 3, 4, 4))


def test_every_thread_count_gives_the_same_bits():
    x, w, before = draw(3, 37, 199), 1 + draw(199), torch.get_num_threads()
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(native.rms_norm(x, w, 1e-5))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_selection_states_its_refusals(monkeypatch):
    table, _ = select(Target("cpu", torch.float32))
    assert table.rms_norm is native.rms_norm
    for target, reason in [
        (Target("cpu", torch.float16), "not float16"),
        (Target("cuda", torch.bfloat16), "not on cuda"),
        (Target("cpu", torch.float32, training=True), "no gradient"),
    ]:
        table, choices = select(target)
        choice = next(c for c in choices if c.op == "rms_norm")
        assert (choice.chosen, table.rms_norm) == ("eager", ops.rms_norm)
        assert reason in dict(choice.refused)["native"]
    monkeypatch.setattr(native, "_load", lambda device: "the native extension is not built here (test)")
    _, choices = select(Target("cpu", torch.float32))
    assert "not built" in str(choices)
    with pytest.raises(DeviceError, match="not built"):
        native.rms_norm(draw(1, 1, 8), draw(8), 1e-5)
