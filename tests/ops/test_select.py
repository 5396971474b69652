"""The choice of implementations: order, refusals, broken packages, and what is imported when."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from tests.registered import NATIVE
from twinflow_rt import ops
from twinflow_rt.ops import OpTable, Target, backends, implementations, mlp, optional, select
from twinflow_rt.ops.implementations import FOUR_BIT_OPS, IMPLEMENTATIONS, QUANTIZED_OPS, RAGGED
from twinflow_rt.ops.selection import SEPARATE, choose, rank, select_quantized

OPS = tuple(f.name for f in fields(OpTable))
H100 = Target("cuda", torch.bfloat16, arch=90, head_dim=128)


@pytest.fixture
def forget():
    """Forgets which packages were looked for, before and after, and what was imported meanwhile."""
    optional.find.cache_clear()
    before = set(sys.modules)
    yield
    optional.find.cache_clear()
    for name in [n for n in sys.modules if n.startswith(("flash_attn", "xformers")) and n not in before]:
        del sys.modules[name]


def reasons(choice):
    return dict(choice.refused)


@pytest.mark.parametrize("op", (*OPS, RAGGED))
def test_rank_names_implementations_only(op):
    for device in ("cpu", "cuda", "mps"):
        for arch in (None, 75, 80, 86, 89, 90, 100, 103, 120):
            names = rank(op, Target(device, torch.bfloat16, arch=arch))
            assert len(set(names)) == len(names) and set(names) <= set(IMPLEMENTATIONS[op]) - {"eager"}


def test_rank():
    assert rank("rms_norm", Target("cpu", torch.float32)) == ("native",)
    assert rank("attention", Target("cpu", torch.float32)) == ()
    assert all(rank(op, H100) == ("cuda", "triton") for op in NATIVE)
    without = ("linear_gelu", "linear_residual", "linear_swiglu", "upsample_conv", "grouped_qk_norm_rope")
    assert all("triton" in rank(op, H100) for op in (*OPS, RAGGED) if op not in without)
    assert all(rank(op, Target("mps", torch.float32)) == () for op in OPS)
    assert set(NATIVE) <= set(OPS) and len(NATIVE) == 10


FIRST = {80: "flash-attn-2", 89: "flash-attn-2", 90: "flash-attn-3", 100: "flash-attn-4", 120: "cudnn"}


@pytest.mark.parametrize("arch, first", FIRST.items())
def test_attention_order(arch, first):
    names = backends.order(arch)
    assert names[0] == first and {"cudnn", "torch-flash", "triton"} < set(names)
    least, beyond = backends.BACKENDS[first].archs
    assert least <= arch < beyond  # no order is led by a backend that cannot run there


@pytest.mark.parametrize(
    "name, target, reason",
    [
        ("flash-attn-3", Target("cuda", torch.bfloat16, arch=80), "capability 9.0"),
        ("flash-attn-3", Target("cuda", torch.bfloat16, arch=100), "this GPU has 10.0"),
        ("cudnn", Target("cuda", torch.bfloat16, arch=90, head_dim=256), "up to 128"),
        ("cudnn", Target("cuda", torch.bfloat16, arch=90, head_dim=36), "multiples of 8"),
        ("torch-flash", Target("cuda", torch.float32, arch=90), "not float32"),
        ("xformers", Target("cpu", torch.float16), "not on cpu"),
        ("triton", Target("cuda", torch.float32, arch=90), "not float32"),
        ("triton", Target("cuda", torch.bfloat16, arch=90, head_dim=320), "not 320"),
    ],
)
def test_attention_refusals(name, target, reason):
    assert reason in IMPLEMENTATIONS["attention"][name].refuses(target)


def test_linear_attention_goes_by_its_own_head_dim():
    from twinflow_rt.models.transformers.sana import SanaConfig

    target = replace(Target.of_network(SanaConfig(), torch.device("cpu"), torch.bfloat16), device="cuda", arch=90)
    assert (target.head_dim, target.linear_head_dim) == (112, 32)
    refuses = IMPLEMENTATIONS["linear_attention"]["triton"].refuses
    assert "head dims" not in (refuses(target) or "") and "not 64" in refuses(replace(target, linear_head_dim=64))


def test_triton_refusals():
    refuses = IMPLEMENTATIONS["swiglu"]["triton"].refuses
    assert "9.0" not in refuses(Target("cuda", torch.bfloat16, arch=75)) and "7.5" in refuses(
        Target("cuda", torch.bfloat16, arch=75)
    )
    assert "no gradient" in refuses(Target("cuda", torch.bfloat16, training=True))
    assert "not float64" in refuses(Target("cuda", torch.float64))
    if find_spec("triton") is None:
        assert "not installed" in refuses(H100)
    elif not torch.cuda.is_available():
        assert "no CUDA device" in refuses(H100)


def test_float8_attention_is_chosen_only_where_asked_for():
    asked = replace(H100, fp8_attention=True)
    table, choices = select(asked)
    chosen = {c.op: c.chosen for c in choices}
    assert "attention_fp8" in chosen and "attention" not in chosen and RAGGED not in chosen
    if chosen["attention_fp8"] == "eager":
        assert table.attention is ops.attention_fp8
    assert "attention_fp8" not in {c.op for c in select(H100)[1]}
    refuses = IMPLEMENTATIONS["attention_fp8"]["triton"].refuses
    assert "8.9" in refuses(replace(asked, arch=86)) and "not float32" in refuses(replace(asked, dtype=torch.float32))


@pytest.mark.parametrize("op", QUANTIZED_OPS)
def test_rows_of_float8_need_a_chip_that_stores_them(op):
    float8 = replace(H100, quantized=torch.float8_e4m3fn)
    product = op == "linear_quantized"
    names = ("scaled-mm", "cuda", "int8-mm") if product else ("cuda", "triton")
    assert rank(op, float8) == names
    for name in names[:1] if product else names:
        refuses = IMPLEMENTATIONS[op][name].refuses
        assert "8.9" in refuses(replace(float8, arch=86)) and "8.9" not in (refuses(replace(float8, arch=89)) or "")


def test_rows_of_a_cpu_are_made_by_its_kernels():
    cpu = Target("cpu", torch.float32, quantized=torch.int8)
    assert rank("linear_quantized", cpu) == ("native", "int8-mm")
    assert all(rank(op, cpu) == ("native",) for op in QUANTIZED_OPS if op != "linear_quantized")
    float8 = replace(cpu, quantized=torch.float8_e4m3fn)  # which a CPU emulates, by the references
    assert all("not float8" in IMPLEMENTATIONS[op]["native"].refuses(float8) for op in QUANTIZED_OPS)


def test_ops_of_4_bits_are_chosen():
    target = replace(H100, quantized=torch.int8)
    assert all(rank(op, target) == ("triton",) for op in FOUR_BIT_OPS)
    assert [c.op for c in select_quantized(target)[1]] == [*QUANTIZED_OPS, *FOUR_BIT_OPS]
    plain = IMPLEMENTATIONS["linear_w4a16"]["triton"].refuses
    assert "not float32" in plain(replace(H100, dtype=torch.float32)) and "8.0" in plain(replace(H100, arch=75))
    nvfp4 = IMPLEMENTATIONS["linear_nvfp4"]["triton"].refuses
    assert "12.0, this has 9.0" in nvfp4(H100) and "12.0" not in (nvfp4(replace(H100, arch=121)) or "")
    assert "gives bfloat16" in nvfp4(replace(H100, dtype=torch.float16, arch=120))


def test_products_of_rows_say_what_they_multiply(monkeypatch):
    monkeypatch.setattr(implementations, "sums_int8", lambda: True)
    refuses = {name: i.refuses for name, i in IMPLEMENTATIONS["linear_quantized"].items()}
    assert "not int8" in refuses["scaled-mm"](replace(H100, quantized=torch.int8))
    assert "gives bfloat16, not float16" in refuses["scaled-mm"](replace(H100, dtype=torch.float16))
    assert "not float8" in refuses["cuda"](replace(H100, quantized=torch.float8_e4m3fn))
    assert "not float8" not in (refuses["cuda"](replace(H100, quantized=torch.int8)) or "")
    assert refuses["int8-mm"](replace(H100, quantized=torch.int8)) is None
    assert "8.0" in refuses["int8-mm"](replace(H100, quantized=torch.int8, arch=75))
    cpu = Target("cpu", torch.float32, quantized=torch.float8_e4m3fn)
    assert "not float8" in refuses["int8-mm"](cpu) and "not on cpu" in refuses["scaled-mm"](cpu)
    assert refuses["int8-mm"](replace(cpu, quantized=torch.int8)) is None
    monkeypatch.setattr(implementations, "sums_int8", lambda: False)
    assert "VNNI" in refuses["int8-mm"](replace(cpu, quantized=torch.int8))
    assert refuses["int8-mm"](replace(H100, quantized=torch.int8)) is None


def test_every_refusal_is_stated_and_eager_remains():
    _, choices = select(Target("cuda", torch.float64, arch=90))
    assert [c.op for c in choices] == [*OPS, RAGGED]
    torchs = {**dict.fromkeys(SEPARATE, "separate"), "upsample_conv": "folded"}  # what torch does in any dtype
    for choice in choices:
        assert choice.chosen == torchs.get(choice.op, "eager")
        target = Target("cuda", torch.float64, arch=90)
        assert set(reasons(choice)) == set(rank(choice.op, target)) - {choice.chosen} and all(reasons(choice).values())


def test_products_and_what_follows():
    """Fused where the saved pass is worth more than the vendor's product; tanh-GELU and the residual go into
    cuBLAS's epilogue wherever there is one."""
    target = lambda arch: Target("cuda", torch.bfloat16, arch=arch)
    for arch, first in {80: "triton", 89: "triton", 90: "separate", 100: "separate", 120: "triton"}.items():
        assert rank("linear_swiglu", target(arch))[0] == first
        assert rank("linear_gelu", target(arch)) == ("cublaslt", "separate")
        assert rank("linear_residual", target(arch)) == ("cublas",)
    assert rank("linear_swiglu", target(None)) == rank("linear_swiglu", Target("cpu", torch.float32)) == ("separate",)
    assert "not float32" in IMPLEMENTATIONS["linear_swiglu"]["triton"].refuses(Target("cuda", torch.float32, arch=89))
    for op in ("linear_gelu", "linear_residual"):
        for name in {"cublaslt", "cublas"} & set(IMPLEMENTATIONS[op]):
            assert "not on cpu" in IMPLEMENTATIONS[op][name].refuses(Target("cpu", torch.float32))


def test_a_separate_product_is_followed_by_the_op_that_was_chosen():
    table, choices = select(Target("cpu", torch.float32))
    assert {c.op: c.chosen for c in choices}["linear_swiglu"] == "separate"
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(10, 8), torch.randn(10)
    assert torch.equal(table.linear_swiglu(x, weight), table.swiglu(F.linear(x, weight)))
    assert torch.equal(table.linear_gelu(x, weight, bias), table.gelu_tanh(F.linear(x, weight, bias)))
    assert table == select(Target("cpu", torch.float32))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_epilogues_of_cublas(dtype):
    """The operators exist and mean this. (A CPU's `_addmm_activation` has the exact GELU: 5e-4 from the tanh form.)"""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 8).to(dtype), torch.randn(10, 8).to(dtype), torch.randn(10).to(dtype)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    got = mlp.linear_gelu_epilogue(x, weight, bias)
    assert got.shape == exact.shape and got.dtype == dtype
    assert (got.double() - exact).abs().max() < 6e-4 + torch.finfo(dtype).eps * exact.abs().max()
    residual = torch.randn(2, 3, 10).to(dtype)
    exact = residual.double() + x.double() @ weight.double().t()
    got = mlp.linear_residual_epilogue(residual, x, weight)
    assert got.shape == exact.shape and got.dtype == dtype
    assert (got.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    assert mlp.linear_residual_epilogue(residual[:, ::2], x[:, ::2], weight).equal(got[:, ::2])
    assert mlp.linear_gelu_epilogue(x[:0], weight, bias).shape == (0, 3, 10)


def fake(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


def test_broken_packages_are_named(tmp_path, monkeypatch, forget):
    fake(tmp_path, "flash_attn", "raise ImportError('undefined symbol: _ZN3c105ErrorC2E')")
    fake(tmp_path, "flash_attn_interface", "import a_module_nobody_has")
    fake(tmp_path, "xformers", "raise OSError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    why = reasons(choose("attention", H100))
    assert "flash_attn is installed but broken: ImportError: undefined symbol" in why["flash-attn-2"]
    assert "broken: it needs a_module_nobody_has" in why["flash-attn-3"]
    assert "broken: OSError: libcudart.so.12" in why["xformers"]
    assert optional.find("flash_attn").broken and not optional.find("surely_absent").broken


def test_working_packages_are_taken(tmp_path, monkeypatch, forget):
    """A package that imports is called, and either form of its result is understood."""
    body = "def flash_attn_func(q, k, v): return {}"
    fake(tmp_path, "flash_attn", body.format("q + v"))
    fake(tmp_path, "flash_attn_interface", body.format("(k, 'log-sum-exp')"))
    monkeypatch.syspath_prepend(tmp_path)
    q, k, v = torch.randn(3, 2, 5, 3, 8).unbind(0)
    table, choices = select(H100)
    assert next(c.chosen for c in choices if c.op == "attention") == "flash-attn-3"
    assert torch.equal(table.attention(q, k, v), k.flatten(2))
    lengths = torch.tensor([5, 2])  # ragged batches take the implementation chosen for them
    if not torch.cuda.is_available():
        assert torch.equal(table.attention(q, k, v, lengths), ops.attention(q, k, v, lengths))
    assert choose("attention", Target("cuda", torch.bfloat16, arch=80)).chosen == "flash-attn-2"
    assert torch.equal(IMPLEMENTATIONS["attention"]["flash-attn-2"].load()(q, k, v), (q + v).flatten(2))
    monkeypatch.setattr(optional, "_version", lambda name: "2.5.9")
    optional.find.cache_clear()
    assert "2.5.9 is older than 2.7" in choose("attention", Target("cuda", torch.bfloat16, arch=80)).refused[0][1]


def test_versions():
    assert optional.older("3.5.1", (3, 6)) and optional.older("0.0.29.post2", (0, 0, 30))
    assert not any(optional.older(v, (3, 6)) for v in ("3.6.0", "3.7.1+git1", "4", "3.10.0rc1", None))


@pytest.mark.parametrize("name", ["cudnn", "torch-flash"])
def test_torch_backends_are_called_by_operators_that_exist(name):
    """On the meta device: the operator, its arguments and the layout of its result; arithmetic needs a GPU."""
    q, k, v = torch.empty(2, 37, 3, 4, 64, device="meta", dtype=torch.bfloat16).unbind(2)
    out = backends.BACKENDS[name].load()(q[:, :20], k, v)
    assert out.shape == (2, 20, 256) and out.dtype == torch.bfloat16


def test_a_cpu_target_imports_no_gpu_software():
    code = (
        "import torch, sys; from twinflow_rt.ops import Target, select; select(Target('cpu', torch.float32));"
        "assert not {'triton', 'flash_attn', 'xformers', 'twinflow_rt.kernels.norm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_warm_up_runs_each_shape_once():
    seen = []
    attention = lambda q, k, v: seen.append((q.shape, k.shape, v.stride()))
    shapes = [(1, 4, 6, 2, 8), (2, 6, 6, 2, 8), (1, 4, 6, 2, 8), (1, 9, 6, 2, 8)]
    assert backends.warm_up(attention, shapes, torch.float32, "cpu") == 3
    assert seen[2] == ((1, 9, 2, 8), (1, 6, 2, 8), (6 * 32, 32, 8, 1))
    assert seen[0] == ((1, 4, 2, 8), (1, 6, 2, 8), (6 * 48, 48, 8, 1))
