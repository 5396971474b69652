"""Weights of 4 bits in whole networks: folded beside them, read from files' own blocks, saved, streamed, exported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import gguf_factory, qwen_image_factory, sana_factory, sd3_factory, z_image_factory
from tests.factory import WEIGHTS, make_model, randomize
from tests.networks import ONE, family, inputs, relative, run_step, save
from twinflow_rt import load
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.fuse import sources
from twinflow_rt.checkpoint.lora import Merged
from twinflow_rt.compile import Recipe, compile_network
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.export.program import check_exportable, use_eager_ops
from twinflow_rt.families import family_of
from twinflow_rt.models.text_encoders import qwen3
from twinflow_rt.ops.int4 import dense
from twinflow_rt.passes import quantize
from twinflow_rt.passes.blocks import runs_per_prompt
from twinflow_rt.passes.layers import QuantizedLinear
from twinflow_rt.planning import precision as precisions
from twinflow_rt.stages.stage import StageOptions, open_part

CPU = torch.device("cpu")
HEADS = {"attention_head_dim": 32, "num_attention_heads": 2}
SANA = {**HEADS, "cross_attention_head_dim": 32, "cross_attention_dim": 64}
FAMILIES = {  # whose layers have inputs in groups of 64
    "z-image": (z_image_factory, replace(
        z_image_factory.SMALL, dim=192, n_layers=2, axes_dims=(32, 32, 32), axes_lens=(256, 32, 32)
    )),
    "qwen-image": (qwen_image_factory, replace(qwen_image_factory.SMALL, **HEADS, axes_dims_rope=(8, 12, 12))),
    "sd3": (sd3_factory, replace(sd3_factory.SMALL, **HEADS, caption_projection_dim=64)),
    "sana": (sana_factory, replace(sana_factory.SMALL, **SANA)),
    "sprint": (sana_factory, replace(sana_factory.SPRINT, **SANA)),
}  # fmt: skip


def kind_of(name):
    """Types as files mix them: layers of 4 bits with and without minimums, sensitive ones in 8."""
    with_minimums = any(part in name for part in ("mlp", "ff.", "ff_context", "w1.", "w3.", "attn1"))
    return "Q8_0" if "to_out" in name or "w2" in name else "Q4_1" if with_minimums else "Q4_0"


def in_gguf(folder, tensors, config, kind):
    (save(folder, {}, config) / WEIGHTS).unlink()
    gguf_factory.write(folder / "model.gguf", tensors, kind)
    return Checkpoint(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A family's reference, inputs, and its checkpoint in GGUF."""
    factory, config = FAMILIES[request.param]
    reference = factory.TwinFlowReference(config)
    checkpoint = in_gguf(tmp_path_factory.mktemp("int4") / "transformer", reference.tensors(), config, kind_of)
    return reference, inputs(factory.SHAPES[0], config), checkpoint, family(config)


def compiled(case, precision, **how):
    *_, checkpoint, kind = case
    return compile_network(Recipe(checkpoint, kind, CPU, torch.float32, precision=precision, **how), ONE)


def quantized(network):
    return {n: m for n, m in network.named_modules() if isinstance(m, QuantizedLinear)}


def test_folding_leaves_blocks_as_they_are(case):
    """The folded network equals diffusers' unfolded one on the same weights of 4 bits, W4A16 in float32."""
    reference, args, checkpoint, kind = case
    program = compiled(case, "w4a16")
    layers = quantized(program.network)
    assert layers and {layer.kind for layer in layers.values()} == {"w4a16"} and not program.plan.absorbed
    weights = {name: checkpoint.get(name, dtype=torch.float32) for name in checkpoint}
    for name, layer in layers.items():
        parts = sources(f"{name}.weight", kind.layout.fused)
        rows = [len(weights[part]) for part in parts]
        mine = dict(zip(parts, dense(layer.int4).split(rows), strict=True))
        if layer.origin == "the file's own":  # what it stands for, but for scales in float16
            assert all(relative(mine[part], weights[part]) < 2**-9 for part in parts)
        weights |= mine
    assert {layer.origin for layer in layers.values()} >= {"the file's own"}
    second = f"{reference.prefix}."
    reference.network.load_state_dict({k: v for k, v in weights.items() if not k.startswith(second)})
    if reference.second is not None:
        of_second = {k.removeprefix(second): v for k, v in weights.items() if k.startswith(second)}
        reference.second.load_state_dict(of_second)
    assert relative(run_step(program.network, args, 0), reference.velocity(args, *ONE[0])) < 1e-5


def test_rows_of_8_bits_and_streams_change_little(case):
    """W4A8 on all families; blocks that are read as they run are the same blocks."""
    _, args, _, _ = case
    exact, rounded, streamed = compiled(case, "w4a16"), compiled(case, "int4"), compiled(case, "int4", streamed=2)
    layers = quantized(rounded.network)
    kinds = {(layer.kind, runs_per_prompt(rounded.network, name)) for name, layer in layers.items()}
    assert {("int4", False)} <= kinds <= {("int4", False), ("w4a16", True)}
    assert "linear_w4a8" in {choice.op for choice in rounded.plan.choices}
    assert any(layer.weight_group_minimum is not None for layer in layers.values())
    expected = run_step(exact.network, args, 0)
    got = run_step(rounded.network, args, 0)
    assert 1e-5 < float((got - expected).norm() / expected.norm()) < 0.05
    for _ in range(2):
        assert torch.equal(run_step(streamed.network, args, 0), got)
    assert any(layer.weight.is_meta for layer in quantized(streamed.network).values())
    assert [str(group) for group in streamed.plan.layers] == [str(group) for group in rounded.plan.layers]


def test_the_plan_says_which_blocks_are_whose(case, tmp_path):
    """The file's own; made anew of blocks of other forms, of merged layers of several, of what an adapter changes."""
    *_, checkpoint, kind = case
    own = compiled(case, "int4")
    names = {name for name, layer in quantized(own.network).items() if layer.origin == "the file's own"}
    name = next(name for name in names if "qkv" in name)
    part = sources(f"{name}.weight", kind.layout.fused)[0]
    rows, inputs = checkpoint.shape(part)
    module = f"transformer.{part.removesuffix('.weight')}"
    factors = {f"{module}.lora_A.weight": torch.ones(1, inputs), f"{module}.lora_B.weight": torch.ones(rows, 1)}
    save_file(factors, tmp_path / "x.safetensors")
    merged = Merged(checkpoint.folder, [(tmp_path / "x.safetensors", 0.5)])
    adapted = quantized(compiled((None, None, merged, kind), "int4").network)
    assert {n for n in names if "adapter" in adapted[n].origin} == {name}
    assert "made anew of blocks of another form" in str(own.plan) and "the file's own" in str(own.plan)
    monkey = {part: None}
    mixed = Checkpoint(checkpoint.folder)
    form = mixed.int4_form
    mixed.int4_form = lambda n: monkey.get(n, form(n))
    assert "several forms" in quantized(compiled((None, None, mixed, kind), "int4").network)[name].origin


# -- whole models ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Z-Image whose network is in GGUF: w2 in 4 bits, layers of 48 inputs, which make no groups, in float32."""
    folder = make_model(tmp_path_factory.mktemp("model") / "m")
    tensors = load_file(folder / "transformer" / WEIGHTS)
    (folder / "transformer" / WEIGHTS).unlink()
    gguf_factory.write(folder / "transformer" / "model.gguf", tensors, "Q4_1")
    return folder


ARGUMENTS = {"height": 16, "width": 24, "seed": 3, "output": "latent"}


@pytest.mark.parametrize("skip", [(), ("layers.0.feed_forward.w2:w4a16", "to_out:int8", "to_qkv")])
def test_saved_programs_hold_the_blocks(folder, tmp_path, skip):
    pipe = load(folder, device="cpu", dtype="float32", precision="int4", skip_layers=skip)
    kinds = {name: layer.kind for name, layer in quantized(pipe.program.network).items()}
    assert kinds["layers.1.feed_forward.w2"] == "int4" and kinds["layers.1.attention.to_out.0"] == "int8"
    assert kinds["layers.0.feed_forward.w2"] == ("w4a16" if skip else "int4")
    assert ("layers.1.attention.to_qkv" in kinds) is not bool(skip)
    assert "inputs are no multiple of 64: kept out of int4" in str(pipe.plan)
    image, saved = pipe("a red square", **ARGUMENTS).images, pipe.save(tmp_path / "saved")
    stored = Checkpoint(saved / "transformer", quantized=True)
    leaves = {name.rpartition(".")[2] for name in stored if name.startswith("layers.1.feed_forward.w2.")}
    assert leaves == {"weight", "weight_scale", "weight_group_scale", "weight_group_minimum"}
    again = load(saved, device="cpu")
    assert {name: layer.kind for name, layer in quantized(again.program.network).items()} == kinds
    assert torch.equal(again("a red square", **ARGUMENTS).images, image)


def test_another_schedule_and_back(folder):
    pipe = load(folder, device="cpu", dtype="float32", precision="int4", text_precision="int4")
    assert any("linear int8" in note and "kept out of int4" in note for note in pipe.text.notes())  # 32 inputs
    first = pipe("a red square", **ARGUMENTS).images
    pipe("a red square", nfe=2, **ARGUMENTS)
    assert torch.equal(pipe("a red square", nfe=1, **ARGUMENTS).images, first)


def test_files_of_4_bits_stay_so_unless_asked(tmp_path, folder):
    """Where nothing is asked for and most of a file has 4 bits."""
    plan = load(folder, device="cpu").plan
    assert plan.precision == "int4" and any("'bf16' reads them dense" in note for note in plan.notes)
    assert load(folder, device="cpu", precision="fp32").plan.precision is None
    *_, config = FAMILIES["qwen-image"]
    tensors = qwen_image_factory.TwinFlowReference(config).tensors()
    for kind, expected in (("Q4_0", "int4"), ("Q8_0", "int8"), ("F16", None)):
        checkpoint = in_gguf(tmp_path / kind, tensors, config, kind)
        precision, notes = precisions.of_files(checkpoint, CPU, torch.float32)
        assert precision == expected and bool(notes) is bool(expected)


@pytest.mark.parametrize("damage", ["absent", "groups", "dtype"])
def test_damaged_programs_are_refused(folder, tmp_path, damage):
    """Hashes say so first; without them, the tensors."""
    saved = load(folder, device="cpu", dtype="float32", precision="int4").save(tmp_path / "saved")
    file, name = saved / "transformer" / "model.safetensors", "layers.1.feed_forward.w2.weight_group_scale"
    tensors = load_file(file)
    if damage == "absent":
        del tensors["layers.1.feed_forward.w2.weight"]
    else:
        tensors[name] = tensors[name].repeat(1, 3).contiguous() if damage == "groups" else tensors[name].float()
    save_file(tensors, file)
    checkpoint = Checkpoint(saved / "transformer", quantized=True)
    kind = family_of(checkpoint.config)
    network = kind.build(kind.config.from_dict(checkpoint.config), folded_steps=1)
    with pytest.raises(CheckpointError, match=r"feed_forward.w2.*save"):
        quantize.expect_quantized(network, checkpoint, "int4")


def test_names_of_kinds_are_checked(folder):
    with pytest.raises(ConfigError, match=r"'w2:int5' ends in no kind of layers: write NAME:int8\|fp8\|int4\|w4a16"):
        load(folder, device="cpu", precision="int4", skip_layers=["w2:int5"])
    with pytest.raises(ConfigError, match="no linear layer is called nonsense"):
        load(folder, device="cpu", precision="int4", skip_layers=["nonsense:int8"])


def test_exported_programs_have_the_weights_dense(folder):
    """Which generated code can multiply: what W4A16 computes, here in float32."""
    pipe = load(folder, device="cpu", dtype="float32", precision="w4a16")
    image = pipe("a red square", **ARGUMENTS).images
    check_exportable(pipe, folder, text_encoder=True)
    use_eager_ops(pipe)
    assert not quantized(pipe.program.network)
    assert relative(pipe("a red square", **ARGUMENTS).images, image) < 1e-5


def test_text_encoders_run_from_their_blocks(tmp_path):
    """Merged projections too: their parts are stored alike. Embeddings are no layers."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, architectures=["Qwen3Model"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    gguf_factory.write(tmp_path / "model.gguf", randomize(Qwen3Model(config), 0).state_dict(), "Q4_1")
    states, ids = {}, torch.arange(10)[None]
    for precision in (None, "w4a16", "int4"):
        part = open_part(tmp_path, qwen3.MODEL)
        part.load(CPU, torch.float32, StageOptions(precision=precision))
        with torch.inference_mode():
            states[precision] = part.network(ids)
        layers = quantized(part.network)
        assert {layer.origin for layer in layers.values()} == ({"the file's own"} if precision else set())
    assert relative(states["w4a16"], states[None]) < 2e-3  # scales are rounded to float16
    assert 1e-4 < relative(states["int4"], states[None]) < 0.1
