"""Packed and int8 linear layers in whole networks: exactness, the plan, artifacts, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.factory import make_model
from twinflow_rt import config, load
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.errors import ConfigError
from twinflow_rt.ops import QuantizedRows, linear
from twinflow_rt.passes import quantize
from twinflow_rt.passes.layers import KINDS, PackedLinear, QuantizedLinear
from twinflow_rt.plan import Plan
from twinflow_rt.planning import sensitivity

CPU = torch.device("cpu")
PRECISIONS = pytest.mark.parametrize("precision", ["int8", "fp8"])
ARGUMENTS = {"height": 16, "width": 24, "seed": 3, "output": "latent"}


@pytest.fixture(scope="module", autouse=True)
def small_layers_are_packed():
    """Models of tests are made of layers that are too small to gain by it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "SMALLEST_PACKED", 0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("quantize") / "model")


@pytest.fixture(scope="module")
def exact(folder):
    """x0 of a program whose linear layers are torch's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "packing_refuses", lambda *a: "not in this test")
        pipe = load(folder, device="cpu", dtype="float32")
    assert {group.kind for group in pipe.plan.layers} == {"plain"}
    return pipe("a red square", **ARGUMENTS).images


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def latents(folder, precision):
    """x0 of the quantized program."""
    return load(folder, device="cpu", dtype="float32", precision=precision)("a red square", **ARGUMENTS).images


def test_every_kind_is_a_precision():
    assert tuple(KINDS) == config.QUANTIZED


def kinds(plan: Plan) -> dict[str, int]:
    return {kind: sum(g.count for g in plan.layers if g.kind == kind) for kind in {g.kind for g in plan.layers}}


def test_packed_is_as_exact_and_states_itself(folder, exact):
    pipe = load(folder, device="cpu", dtype="float32")
    assert kinds(pipe.plan)["packed"] > 0 and "linear       packed" in str(pipe.plan)
    assert any(isinstance(m, PackedLinear) for m in pipe.text.network.modules())
    assert distance(pipe("a red square", **ARGUMENTS).images, exact) < 1e-5


def test_small_float32_layers_stay_plain(monkeypatch):
    monkeypatch.setattr(quantize, "SMALLEST_PACKED", 64 * 64)
    layers = quantize.convert_layers(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 63)), CPU)
    assert [(g.kind, g.parameters) for g in layers] == [("packed", 64 * 64), ("plain", 64 * 63)]
    assert "small" in layers[1].why


def test_packed_layers_keep_names_sizes_and_weights():
    plain = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 33, bias=False), nn.Linear(33, 8))
    packed = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 33, bias=False), nn.Linear(33, 8))
    packed.load_state_dict(plain.state_dict())
    layers = quantize.convert_layers(packed, CPU)
    assert [(g.kind, g.count, g.parameters) for g in layers] == [("packed", 2, 48 * 64 + 64 * 33), ("plain", 1, 33 * 8)]
    assert sum(p.nbytes for p in packed.parameters()) == sum(p.nbytes for p in plain.parameters())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(packed.state_dict()[name], tensor)
    x = torch.randn(2, 5, 48)
    assert torch.allclose(packed(x), plain(x), atol=1e-6)


@PRECISIONS
def test_blocks_only_are_quantized(folder, exact, precision):
    pipe = load(folder, device="cpu", dtype="float32", precision=precision)
    blocks = {n: m for n, m in pipe.program.network.named_modules() if isinstance(m, QuantizedLinear)}
    assert blocks and all(n.startswith(("layers.", "noise_refiner.")) for n in blocks)
    assert {m.weight.dtype for m in blocks.values()} == {KINDS[precision].weight}
    assert kinds(pipe.plan)[precision] == len(blocks) and pipe.plan.precision == precision
    assert pipe.plan.bytes_after < load(folder, device="cpu", dtype="float32").plan.bytes_after
    error = distance(pipe("a red square", **ARGUMENTS).images, exact)
    assert 1e-5 < error < {"int8": 0.03, "fp8": 0.06}[precision], error


@PRECISIONS
def test_errors_are_those_of_the_reference(folder, exact, monkeypatch, precision):
    """The error rule: not above twice that of the specification, which dequantizes and multiplies in float32."""
    fused = distance(latents(folder, precision), exact)
    monkeypatch.setattr(quantize, "bind_quantized", lambda *a: ())  # layers keep the reference, and nothing is fused
    assert fused <= 2 * distance(latents(folder, precision), exact)


@PRECISIONS
def test_norms_and_activations_write_what_is_multiplied(folder, precision):
    """Of the four layers of a block only the output projection of attention quantizes for itself."""
    pipe = load(folder, device="cpu", dtype="float32", precision=precision)
    seen = []
    for name, layer in pipe.program.network.named_modules():
        if isinstance(layer, QuantizedLinear):
            layer.register_forward_pre_hook(lambda m, args, name=name: seen.append((name, args[0])))
    pipe("a red square", **ARGUMENTS)
    assert len(seen) == 4 * len({name.rsplit(".", 2)[0] for name, _ in seen if "to_qkv" in name})
    for name, given in seen:
        assert isinstance(given, QuantizedRows) == ("to_out" not in name), name
    choices = {c.op: c.chosen for c in pipe.plan.choices}
    int8 = ("native", "int8-mm")  # without csrc/ torch's product and the references
    assert choices["linear_quantized"] in int8 if precision == "int8" else choices["linear_quantized"] == "eager"


def test_sensitive_layers_stay_out(folder, exact):
    exempt = ("feed_forward.w2", "to_out")
    pipe = load(folder, device="cpu", dtype="float32", precision="int8", skip_layers=exempt)
    modules = dict(pipe.program.network.named_modules())
    assert isinstance(modules["layers.0.attention.to_qkv"], QuantizedLinear)
    assert isinstance(modules["layers.0.feed_forward.w2"], PackedLinear)
    assert pipe.plan.skip_layers == exempt and "sensitive" in str(pipe.plan)
    assert distance(pipe("a red square", **ARGUMENTS).images, exact) > 0


@PRECISIONS
def test_precision_survives_another_schedule(folder, precision):
    pipe = load(folder, device="cpu", dtype="float32", precision=precision)
    first = pipe("a red square", **ARGUMENTS).images
    pipe("a red square", nfe=2, **ARGUMENTS)
    assert pipe.program.plan.precision == precision
    assert torch.equal(pipe("a red square", nfe=1, **ARGUMENTS).images, first)


@pytest.mark.parametrize("precision", [None, "int8", "fp8"])
def test_artifacts_hold_what_was_computed_with(folder, tmp_path, precision):
    pipe = load(folder, device="cpu", dtype="float32", precision=precision)
    first, saved = pipe("a red square", **ARGUMENTS).images, pipe.save(tmp_path / "saved")
    stored = Checkpoint(saved / "transformer", quantized=True)
    kept = {stored.dtype(n) for n in stored} & {kind.weight for kind in KINDS.values()}
    assert kept == ({KINDS[precision].weight} if precision else set())
    again = load(saved, device="cpu")
    assert kinds(again.plan) == kinds(pipe.plan) and again.plan.precision == precision
    assert torch.equal(again("a red square", **ARGUMENTS).images, first)
    with pytest.raises(ConfigError, match="load the model folder"):
        load(saved, device="cpu", precision="fp32" if precision else "int8")


def test_emulated_bfloat16_is_never_multiplied(folder, monkeypatch):
    """A CPU without bfloat16 instructions: asked for nothing, weights become float32 and the plan says
    so; asked for bfloat16, it is stored so and multiplied in float32."""
    monkeypatch.setattr("twinflow_rt.config.has_native", lambda dtype, device: dtype == torch.float32)
    monkeypatch.setattr(quantize, "has_native", lambda dtype, device: dtype == torch.float32)
    pipe = load(folder, device="cpu", dtype="bfloat16")
    assert "upcast" in kinds(pipe.plan)
    layer = pipe.program.network.layers[0].attention.to_qkv
    x = torch.randn(1, 7, layer.in_features).bfloat16()
    expected = (x.double() @ layer.weight.double().t()).bfloat16()
    assert torch.equal(layer(x), expected) or distance(layer(x), expected) < 2**-9
    assert quantize.dtype_notes(torch.bfloat16, torch.float32, CPU)[0].startswith("stored in bfloat16")
    assert quantize.dtype_notes(torch.float32, torch.float32, CPU) == ()


def test_precision_is_checked(folder):
    with pytest.raises(ConfigError, match="one of auto, fp32, fp16, bf16, int8, fp8, int4, w4a16"):
        load(folder, precision="int3")
    with pytest.raises(ConfigError, match="give one of the two"):
        load(folder, precision="bf16", dtype="float32")
    with pytest.raises(ConfigError, match="runs on CPUs and NVIDIA GPUs, not on mps"):
        quantize.convert_layers(nn.Linear(64, 64), torch.device("mps"), "int8")
    with pytest.raises(ConfigError, match="come out in bfloat16, not float32"):
        quantize.require("fp8", torch.device("cuda"), torch.float32)
    assert load(folder, device="cpu", precision="fp32").dtype == torch.float32
    assert load(folder, device="cpu", precision="auto").plan.precision is None


@pytest.mark.parametrize(("precision", "too_old", "old_enough"), [("fp8", (8, 6), (8, 9)), ("int8", (7, 5), (8, 0))])
def test_gpus_without_such_products_are_refused_by_name(monkeypatch, precision, too_old, old_enough):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: too_old)
    least, has = (r"\.".join(map(str, version)) for version in (old_enough, too_old))
    with pytest.raises(ConfigError, match=f"precision {precision}: .* {least} or newer, cuda has {has}; use bf16"):
        quantize.require(precision, torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: old_enough)
    quantize.require(precision, torch.device("cuda"), torch.bfloat16)


def test_layers_that_a_gpu_cannot_align_stay_as_they_are():
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 36))])
    for device, second in ((torch.device("cuda"), None), (CPU, "int8")):
        kinds = [quantize.quantizes(network, f"blocks.0.{i}", network.blocks[0][i], device, "int8", ()) for i in (0, 1)]
        assert kinds == ["int8", second]


@PRECISIONS
def test_quantized_tensors_are_read_dense_in_a_model_folder(folder, tmp_path, precision):
    saved = load(folder, device="cpu", dtype="float32", precision=precision).save(tmp_path / "saved")
    dense, held = Checkpoint(saved / "transformer"), Checkpoint(saved / "transformer", quantized=True)
    scaled = [name for name in held if f"{name}_scale" in held]
    assert scaled and not any(f"{name}_scale" in dense for name in scaled)
    for name in scaled:
        expected = held.get(name).double() * held.get(f"{name}_scale").double()
        assert torch.allclose(dense.get(name, dtype=torch.float32).double(), expected, rtol=1e-6, atol=0)


def test_sensitivity_finds_the_layers_that_int8_hurts(folder):
    """Rows of very different columns lose their small ones: such layers must come out on top."""
    pipe = load(folder, device="cpu", dtype="float32")
    network = pipe.program.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = sensitivity.of_pipeline(pipe, rounds=1).groups
    assert [g.error for g in found] == sorted((g.error for g in found), reverse=True)
    assert all(0 < g.error < 0.05 for g in found) and {g.name for g in found} == set(quantize.layer_groups(network))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    for layer in quantize.layer_groups(network)["layers.feed_forward.w2"].values():
        weight = layer.weight.detach().to_dense()
        weight[:, 0] *= 1000
        layer.weight = nn.Parameter(linear.pack(weight), requires_grad=False)
    worst = sensitivity.of_pipeline(pipe, rounds=1).groups[0]
    assert worst.name == "layers.feed_forward.w2"


@PRECISIONS
def test_weights_are_quantized_as_they_arrive(folder, monkeypatch, precision):
    """Never two of them in the checkpoint's dtype: a device need not hold the network, or the encoder, as it was."""
    arrived, waiting = quantize.stored_form, []

    def watch(network, *rest):
        layers = (layer for some in quantize.layer_groups(network, precision).values() for layer in some.values())
        waiting.append([m for m in layers if not m.weight.is_meta and not isinstance(m, QuantizedLinear)])
        return arrived(network, *rest)

    monkeypatch.setattr(quantize, "stored_form", watch)
    load(folder, device="cpu", dtype="float32", precision=precision, text_precision=precision)
    assert len(waiting) > 20 and not any(waiting)


def test_advice_stays_within_its_budget():
    found = [sensitivity.Group(name, 1, 1, error) for name, error in (("a", 0.3), ("b", 0.04), ("c", 0.03))]
    assert sensitivity.advise(found, 1.0) == ()
    assert sensitivity.advise(found, 0.05) == ("a",)
    assert sensitivity.advise(found, 0.045) == ("a", "b")
    assert sensitivity.advise(found, 0.0) == ("a", "b", "c")


def test_advice_is_what_load_takes(folder):
    kept = load(folder, device="cpu", dtype="float32", precision="int8", skip_layers=["layers.feed_forward.w2"])
    assert isinstance(kept.program.network.layers[1].feed_forward.w2, PackedLinear)
    with pytest.raises(ConfigError, match="not quantized yet"):
        sensitivity.of_pipeline(kept)


def test_nvfp4_is_refused_by_name_but_on_12_0(monkeypatch):
    with pytest.raises(ConfigError, match=r"precision nvfp4: .*compute capability 12\.0, not on cpu; use int4"):
        quantize.require("nvfp4", CPU)
    gpu = torch.device("cuda")
    assert "come out in bfloat16, not float16" in quantize.refuses("nvfp4", gpu, torch.float16)
    for have in ((12, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a, have=have: have)
        reason = quantize.refuses("nvfp4", gpu, torch.bfloat16)
        assert reason is None if have == (12, 0) else "not on compute capability 9.0; use int4" in reason


def test_nvfp4_layers_by_the_reference(folder, exact, monkeypatch, tmp_path):
    """A CPU refuses them; where it does not, whole networks run on the specification, saved and loaded too."""
    monkeypatch.setattr(quantize, "refuses", lambda *a: None)
    monkeypatch.setitem(quantize.MULTIPLES, "nvfp4", 16)  # small layers
    pipe = load(folder, device="cpu", dtype="float32", precision="nvfp4")
    some = [m for m in pipe.program.network.modules() if isinstance(m, QuantizedLinear)]
    assert kinds(pipe.plan)["nvfp4"] == len(some) and {m.kind for m in some} == {"nvfp4"}
    assert "linear_nvfp4" in {c.op for c in pipe.plan.choices}
    assert all(2 * m.weight.nbytes == m.in_features * m.out_features for m in some)
    images = pipe("a red square", **ARGUMENTS).images
    assert 0.01 < distance(images, exact) < 0.3
    pipe.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", device="cpu")("a red square", **ARGUMENTS).images, images)
