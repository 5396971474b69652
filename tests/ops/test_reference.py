"""The eager references are the specification: each against float64 arithmetic, in units of its rounding."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from benches.ops.case import SIZES, Sizes, outputs
from benches.ops.eight_bit_cases import eight_bit_cases
from benches.ops.op_cases import cases
from twinflow_rt.ops import EAGER, OpTable
from twinflow_rt.ops.implementations import IMPLEMENTATIONS

ODD = Sizes(image=199, text=1, heads=1, head_dim=26, hidden=37, latents=(3, 2, 2), pixels=7)
NAMES = [c.name for c in cases(SIZES["tiny"], torch.float32, "cpu")]
# units in the last place of the largest value: half of one where an op rounds once
ULPS = {
    "attention": 2.0, "qk_norm_rope": 1.5, "joint_qk_norm_rope": 1.5, "grouped_qk_norm_rope": 1.5, "residual_norm": 1.5,
    "residual_layer_norm": 1.5, "linear_swiglu": 1.5, "linear_gelu": 1.5, "linear_residual": 1.0, "upsample_conv": 1.0,
}  # fmt: skip


def test_every_op_has_a_case():
    assert {c.op for c in cases(SIZES["tiny"], torch.float32, "cpu")} == {f.name for f in fields(OpTable)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [SIZES["tiny"], ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("name", NAMES)
def test_eager(name, sizes, dtype):
    case = next(c for c in cases(sizes, dtype, "cpu", batch=2) if c.name == name)
    got, exact = outputs(getattr(EAGER, case.op)(*case.inputs())), case.exact(*case.inputs())
    assert len(got) == len(exact)
    for y, truth in zip(got, exact, strict=True):
        assert y.shape == truth.shape
        if y.dtype == torch.uint8:
            allowed = 0.5 + 1e-4
        else:
            assert y.dtype == dtype
            largest = truth.abs().max().item()
            allowed = (ULPS.get(case.op, 0.5) * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps) * largest
        assert (y.double() - truth).abs().max().item() <= allowed


def test_ragged_attention_ignores_the_padding():
    q, k, v = torch.randn(3, 2, 9, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    lengths = torch.tensor([9, 4])
    full = EAGER.attention(q, k, v, lengths)
    k, v = k.clone(), v.clone()
    k[1, 4:], v[1, 4:] = 1e9, 1e9
    assert torch.equal(EAGER.attention(q, k, v, lengths), full)
    torch.testing.assert_close(full[1:], EAGER.attention(q[1:], k[1:, :4], v[1:, :4]))


def test_bytes_at_the_ends():
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.00392]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert EAGER.to_uint8(image)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 128]


def test_the_optional_parts_are_identities():
    x, branch = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    one, zero = torch.ones(8), torch.zeros(8)
    assert torch.equal(EAGER.layer_norm(x, None, 1e-5), EAGER.layer_norm(x, one, 1e-5, zero))
    for a, b in zip(
        EAGER.residual_layer_norm(x, branch, None, None, None, 1e-5),
        EAGER.residual_layer_norm(x, branch, one, one, zero, 1e-5), strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)
    total, h = EAGER.residual_norm(x, branch, one, None, 1e-5)
    assert h is None and torch.equal(total, EAGER.residual_norm(x, branch, one, one, 1e-5)[0])


@pytest.mark.parametrize("name", [c.name for c in eight_bit_cases(SIZES["tiny"], torch.float32, "cpu")])
def test_kernels_beside_the_table(name):
    """Quantized rows are off by half a step of their code: 1/16 of a value in e4m3, 1/254 of the largest in int8."""
    case = next(c for c in eight_bit_cases(SIZES["tiny"], torch.float32, "cpu") if c.name == name)
    reference = IMPLEMENTATIONS[case.op]["eager"].load()
    got, exact = outputs(case.read(reference(*case.inputs()))), case.exact(*case.inputs())
    kind = None if case.op == "linear_quantized" else case.name.rpartition(", ")[2]  # a product rounds nothing
    for y, truth in zip(got, exact, strict=True):
        largest = truth.abs().amax(-1, keepdim=True)
        step = {"float8": truth.abs() / 16 + largest / 448 / 512, "int8": largest / 254}.get(kind, 0)
        assert ((y.double() - truth).abs() <= step * 1.001 + 1e-5 * truth.abs().max()).all()
