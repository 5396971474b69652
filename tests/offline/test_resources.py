"""Every kernel, at the shapes of the networks it serves, compiled for every supported chip.

Asserts what a GPU would otherwise reveal as slowness or a launch failure: spilled registers, stack
frames, shared memory beyond the chip's, and matrix products that miss the tensor cores.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from compiler import SHARED_LIMIT, build, record

from twinflow_rt.kernels import attention, attention_fp8, decode, int4, launch, linear, mlp, norm, nvfp4, rope, sample

ARCHS = tuple(SHARED_LIMIT)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MATRIX_UNIT = dict.fromkeys(ARCHS, "mma.sync") | {90: "wgmma.mma_async", 100: "tcgen05.mma"}
EPS = 1e-5
# image tokens + prompt tokens, width, heads: the demo, Z-Image at 1024^2, Qwen-Image at 1328^2
NETWORKS = {"demo": (272, 144, 3), "z_image": (4224, 3840, 30), "qwen_image": (7144, 3072, 24)}


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def check(monkeypatch, tmp_path, module, arch, call):
    launches = record(monkeypatch, module, arch, call)
    assert launches
    for one in launches:
        built = build(one, arch, tmp_path)
        assert built.stack == 0 and built.local == 0, f"spills: {built.stack} B stack, {built.local} B local"
        assert built.shared <= SHARED_LIMIT[arch]
        assert built.registers * built.threads <= 65536
        yield built


def matrix(*axes):
    """Parameters over ARCHS x axes; only the first of each axis, on Hopper, unless `-m full` is asked for."""
    first = (90, *(axis[0] for axis in axes))
    return [pytest.param(*v, marks=() if v == first else pytest.mark.full) for v in product(ARCHS, *axes)]


def formats(arch):
    return launch.QUANTIZED if arch >= 89 else (torch.int8,)


WIDTHS = (3840, 144, 3072, launch.MAX_WIDTH)


@pytest.mark.parametrize("arch, width, dtype", matrix(WIDTHS, DTYPES))
def test_norm(monkeypatch, tmp_path, arch, width, dtype):
    x, w = meta(2, 4224, width, dtype=dtype), meta(2, 1, width)

    def call():
        norm.rms_norm(x, w, EPS)
        norm.layer_norm(x, w, EPS, w)
        norm.residual_norm(x, x, w, w, EPS)
        norm.residual_layer_norm(x, x, w, w, w, EPS)

    assert len(list(check(monkeypatch, tmp_path, norm, arch, call))) == 4


@pytest.mark.parametrize("arch, width, dtype", matrix(WIDTHS, DTYPES))
def test_quantized(monkeypatch, tmp_path, arch, width, dtype):
    x, wide, w = meta(2, 4224, width, dtype=dtype), meta(2, 4224, 2 * width, dtype=dtype), meta(2, 1, width)
    for to in formats(arch):
        call = lambda to=to: (
            norm.rms_norm_quantized(x, w, EPS, to), norm.layer_norm_quantized(x, w, EPS, w, to),
            norm.residual_norm_quantized(x, x, w, w, EPS, to),
            norm.residual_layer_norm_quantized(x, x, w, w, w, EPS, to),
        )  # fmt: skip
        assert len(list(check(monkeypatch, tmp_path, norm, arch, call))) == 4
        call = lambda to=to: (mlp.swiglu_quantized(wide, to), mlp.gelu_tanh_quantized(x, to))
        assert len(list(check(monkeypatch, tmp_path, mlp, arch, call))) == 2
        assert list(check(monkeypatch, tmp_path, linear, arch, lambda to=to: linear.quantize_rows(x, to)))


@pytest.mark.parametrize("arch, hidden, dtype", matrix((18944, launch.MAX_WIDTH + 1), DTYPES))
def test_quantized_wide(monkeypatch, tmp_path, arch, hidden, dtype):
    x = meta(2, 512, 2 * hidden, dtype=dtype)
    for to in formats(arch):
        call = lambda to=to: (mlp.swiglu_quantized(x, to), mlp.gelu_tanh_quantized(x[..., :hidden], to))
        assert len(list(check(monkeypatch, tmp_path, mlp, arch, call))) == 2


@pytest.mark.parametrize("arch, hidden, dtype", matrix((10240, 37), DTYPES))
def test_elementwise(monkeypatch, tmp_path, arch, hidden, dtype):
    x, image, latents = meta(1, 4224, 2 * hidden, dtype=dtype), meta(1, 3, 512, 512, dtype=dtype), meta(1, 16, 128, 128)
    for module, call in (
        (mlp, lambda: (mlp.swiglu(x), mlp.gelu_tanh(x))),
        (decode, lambda: decode.to_uint8(image)),
        (sample, lambda: sample.x0_project(latents, latents.to(dtype))),
    ):
        assert list(check(monkeypatch, tmp_path, module, arch, call))


VAE = ((128, 1024), (512, 256), (96, 1328), (1024, 32))  # channels, pixels along each axis


@pytest.mark.parametrize("arch, layer, dtype", matrix(VAE, DTYPES))
def test_group_norm(monkeypatch, tmp_path, arch, layer, dtype):
    channels, size = layer
    x, w = meta(2, size, size, channels, dtype=dtype).permute(0, 3, 1, 2), meta(channels, dtype=dtype)
    call = lambda: (norm.group_norm_silu(x, 32, w, w, EPS), norm.rms_norm_silu(x, meta(channels), EPS))
    assert len(list(check(monkeypatch, tmp_path, norm, arch, call))) == 4


@pytest.mark.parametrize("arch, size, dtype", matrix((128, 166), DTYPES))
def test_x0_to_vae(monkeypatch, tmp_path, arch, size, dtype):
    x, std, tokens = meta(1, 16, size, size), meta(16), meta(1, size // 2, size // 2, 2, 2, 16, dtype=dtype)
    call = lambda: decode.x0_to_vae(x, tokens.permute(0, 5, 1, 3, 2, 4), 1.0, std, std, dtype)
    assert list(check(monkeypatch, tmp_path, decode, arch, call))


@pytest.mark.parametrize("arch, network, dtype", matrix(("z_image", "demo", "qwen_image"), DTYPES))
def test_rope(monkeypatch, tmp_path, arch, network, dtype):
    tokens, width, heads = NETWORKS[network]
    qkv, w = meta(1, tokens, 3 * width, dtype=dtype), meta(width // heads)
    angle = meta(1, tokens, width // heads // 2)
    joint = angle.repeat(1, 2, 1)

    def call():
        rope.qk_norm_rope(qkv, w, w, angle, angle, heads, EPS)
        rope.joint_qk_norm_rope((qkv, qkv), (w, w), (w, w), joint, joint, heads, EPS)

    assert list(check(monkeypatch, tmp_path, rope, arch, call))


def attention_cases(archs, shown):
    """arch, head dim, queries, whether there are lengths: all under `-m full`, else what `shown` has of (arch, lengths)
    at the size of an image."""
    calls = (4224, True), (4224, False), (64, True)
    for arch, d, (queries, lengths) in product(archs, (128, 64, 96, 48, 256), calls):
        quick = d == 128 and queries == 4224 and shown(arch, lengths)
        yield pytest.param(arch, d, queries, lengths, marks=() if quick else pytest.mark.full)


@pytest.mark.parametrize(
    "arch, d, queries, lengths", list(attention_cases(ARCHS, lambda arch, lengths: arch == 90 or lengths))
)
def test_attention(monkeypatch, tmp_path, arch, d, queries, lengths):
    q, k, v = meta(2, 4224, 3, 30, d, dtype=torch.bfloat16).unbind(2)
    count = meta(2, dtype=torch.int64) if lengths else None
    call = lambda: attention.attention(q[:, :queries], k, v, count)
    (built,) = check(monkeypatch, tmp_path, attention, arch, call)
    assert MATRIX_UNIT[arch] in built.ptx
    assert arch != 90 or ".target sm_90a" in built.ptx  # without the "a" there is neither wgmma nor setmaxnreg
    if arch == 90 and queries > 64 and d <= 128:  # loads by the accelerator, registers moved between warp groups
        assert "cp.async.bulk.tensor" in built.ptx and "setmaxnreg" in built.ptx


FP8_UNIT = {  # of the scores; the probabilities meet v in bfloat16
    89: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3", 90: "k32.f32.e4m3.e4m3", 100: "kind::f8f6f4",
    120: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3",
}  # fmt: skip


@pytest.mark.parametrize(
    "arch, d, queries, lengths", list(attention_cases(FP8_UNIT, lambda arch, lengths: arch in (89, 90) and not lengths))
)
def test_attention_fp8(monkeypatch, tmp_path, arch, d, queries, lengths):
    q, k, v = meta(2, 4224, 3, 30, d, dtype=torch.bfloat16).unbind(2)
    count = meta(2, dtype=torch.int64) if lengths else None
    call = lambda: attention_fp8.attention_fp8(q[:, :queries], k, v, count)
    *_, built = check(monkeypatch, tmp_path, attention_fp8, arch, call)
    assert MATRIX_UNIT[arch] in built.ptx and FP8_UNIT[arch] in built.ptx


@pytest.mark.parametrize("arch, d, dtype", matrix((32, 5), DTYPES))
def test_linear_attention(monkeypatch, tmp_path, arch, d, dtype):
    q, k, v = meta(2, 1024, 3, 70, d, dtype=dtype).unbind(2)
    state, _ = check(monkeypatch, tmp_path, attention, arch, lambda: attention.linear_attention(q, k, v))
    assert dtype == torch.float32 or "mma" in state.ptx


INT8_UNIT = dict.fromkeys(ARCHS, "mma.sync.aligned.m16n8k32") | {90: "wgmma.mma_async"}  # integers of 10.0, too


@pytest.mark.parametrize("arch, rows, group, dtype", matrix((4224, 64, 20), (64, 32), DTYPES[:2]))
def test_int4(monkeypatch, tmp_path, arch, rows, group, dtype):
    """With a minimum and a bias where groups are those of GGUF files; Z-Image's down projection."""
    n, k, files = 3840, 10240, group == 32
    x, values = meta(1, rows, k, dtype=dtype), meta(1, rows, k, dtype=torch.int8)
    groups = meta(n, k // group, dtype=torch.float16)
    weight = meta(n, k // 2, dtype=torch.uint8), groups, groups if files else None, meta(n, 1)
    bias = meta(n, dtype=dtype) if files else None
    call = lambda: (
        int4.linear_w4a8(values, meta(1, rows, 1), *weight, bias, dtype), int4.linear_w4a16(x, *weight, bias)
    )  # fmt: skip
    w4a8, w4a16 = check(monkeypatch, tmp_path, int4, arch, call)
    assert INT8_UNIT[arch] in w4a8.ptx and "s32.s8.s8" in w4a8.ptx and MATRIX_UNIT[arch] in w4a16.ptx


def test_nvfp4(monkeypatch, tmp_path):
    call = lambda: nvfp4.quantized(meta(4224, 3840, dtype=torch.bfloat16))
    assert list(check(monkeypatch, tmp_path, nvfp4, 120, call))


@pytest.mark.parametrize("arch, inner, dtype", matrix((3840, 144), DTYPES[:2]))
def test_linear_swiglu(monkeypatch, tmp_path, arch, inner, dtype):
    x, weight = meta(4224, inner, dtype=dtype), meta(2 * 10240, inner, dtype=dtype)
    (built,) = check(monkeypatch, tmp_path, mlp, arch, lambda: mlp.linear_swiglu(x, weight))
    assert MATRIX_UNIT[arch] in built.ptx
