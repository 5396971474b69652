"""Text encoders with 8-bit linear layers: every family's, against the same encoder as it is stored."""

from __future__ import annotations

import pytest
import torch

from tests.factory import make_model, open_text, read
from twinflow_rt.cli import main
from twinflow_rt.errors import ConfigError
from twinflow_rt.loading import load
from twinflow_rt.passes import quantize
from twinflow_rt.passes.layers import PackedLinear, QuantizedLinear
from twinflow_rt.stages.stage import StageOptions

CPU = torch.device("cpu")
PROMPTS = ["a red square", "日本の 火山", "x" * 70]
STAGES = {"qwen3": "z-image", "qwen2.5-vl": "qwen-image", "gemma2": "sana", "clip-t5": "sd3", "openuni": "openuni"}
BAR = {"int8": 0.05, "fp8": 0.12}


@pytest.fixture(scope="module", params=list(STAGES))
def stage(request, tmp_path_factory):
    """The folder of a text stage, and its embeddings as stored. The miniatures are narrower than what pays."""
    folder = make_model(tmp_path_factory.mktemp(request.param) / "m", STAGES[request.param])
    with torch.inference_mode():
        return folder, read(open_text(folder))(PROMPTS)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(quantize, "NARROWEST", 4)
    monkeypatch.setitem(quantize.MULTIPLES, "fp8", 4)


def quantized(folder, precision, skip_layers=(), dtype=torch.float32):
    text = open_text(folder)
    text.require_precision(precision, skip_layers, CPU, dtype)
    text.materialize(CPU, dtype, StageOptions(precision=precision, skip_layers=tuple(skip_layers)))
    return text


def distance(ours, exact):
    """Of what the network reads: rows that count, and vectors beside them."""
    pairs = [(a[:n], b[:n]) for a, b, n in zip(ours.embeds, exact.embeds, exact.lengths, strict=True)]
    pairs += [(ours.extras[name], exact.extras[name]) for name in exact.extras]
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_embeddings_are_close_to_those_of_the_stored_encoder(stage, precision, monkeypatch):
    """And fused rows are no worse than twice the reference, where every layer quantizes for itself."""
    folder, exact = stage
    text = quantized(folder, precision)
    names = {n for part in text.parts for n, m in part.network.named_modules() if isinstance(m, QuantizedLinear)}
    assert names and not any("embed" in n or "projection" in n or "projector" in n for n in names)
    assert any("qkv" in n for n in names) and f"linear {precision}" in "".join(text.notes())
    with torch.inference_mode():
        error = distance(text(PROMPTS), exact)
        monkeypatch.setattr(quantize, "bind_quantized", lambda *a: ())
        reference = distance(quantized(folder, precision)(PROMPTS), exact)
    assert 1e-4 < error <= 2 * reference and reference < BAR[precision], (error, reference)


def test_t5_in_float16_keeps_its_range(tmp_path):
    """Its `wo` stays float32 there, and so do the rows that a quantized one gives."""
    folder = make_model(tmp_path / "m", "sd3")
    with torch.inference_mode():
        exact = read(open_text(folder))(PROMPTS)
        ours = quantized(folder, "int8", dtype=torch.float16)(PROMPTS)
    assert ours.embeds.dtype == torch.float16 and distance(ours, exact) < BAR["int8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("text") / "m")


def test_a_pipeline_says_so_and_leaves_the_network_alone(model, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "SMALLEST_PACKED", 0)
    pipe = load(model, device="cpu", text_precision="int8", text_skip_layers=["layers.mlp.down_proj"])
    layers = dict(pipe.text.network.named_modules())
    assert isinstance(layers["layers.0.mlp.gate_up_proj"], QuantizedLinear)
    assert isinstance(layers["layers.0.mlp.down_proj"], PackedLinear)
    assert not any(isinstance(m, QuantizedLinear) for m in pipe.program.network.modules())
    text = str(pipe.plan)
    assert "text_encoder linear int8" in text and "sensitive: kept out of int8" in text
    assert pipe("x", height=16, width=16, seed=0).images
    with pytest.raises(ConfigError, match="save without text_precision"):
        pipe.save(tmp_path / "saved")
    load(model, device="cpu").save(tmp_path / "saved")
    assert load(tmp_path / "saved", device="cpu", text_precision="int8").text.options.precision == "int8"


def test_encoded_prompts_know_their_model(model, tmp_path):
    file = tmp_path / "p.safetensors"
    assert main(["encode", "a red", "-o", str(file), "--model", str(model), "--text-precision", "int8"]) == 0
    assert len(load(model, device="cpu").read_embeds(file)) == 1


def test_less_memory_is_planned_for(model):
    options = {"device": "cpu", "memory_budget": "1GB"}
    plain, ours = (load(model, **options, text_precision=p).memory.weights["text"] for p in (None, "int8"))
    assert ours < plain


def test_arguments_are_checked(model):
    for wrong, said in (
        ({"text_precision": "int3"}, "none of int8, fp8, int4, w4a16"),
        ({"text_skip_layers": ["mlp"]}, "text_skip_layers names layers"),
        ({"text_precision": "int8", "text_skip_layers": ["none_such"]}, "no linear layer is called none_such"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(model, device="cpu", **wrong)
