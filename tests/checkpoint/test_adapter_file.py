"""Files of adapters: other tools' names against diffusers', every kind against its published formula in float64."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.test_names import FLUX2, SANA, SD3, ours, shapes
from tests.factory import make_model
from twinflow_rt.checkpoint import names
from twinflow_rt.checkpoint.adapter_file import AdapterFile, Targets, is_adapter
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.lora import Adapter, Merged
from twinflow_rt.cli import main
from twinflow_rt.errors import CheckpointError

NAME = "layers.0.attention.to_k.weight"
RULES = {
    "SD3Transformer2DModel": (names.sd3({"num_layers": 2}), SD3), "SanaTransformer2DModel": (names.sana({}), SANA),
    "Flux2Transformer2DModel": (names.flux2({}), FLUX2),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint(make_model(tmp_path_factory.mktemp("adapters") / "m") / "transformer")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


def written(path, tensors, **options):
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, **options)
    return path


def close(got, expected):
    assert (got.double() - expected.double()).norm() <= 1e-5 * expected.double().norm()


def pairs(module, rows, columns, down="lora_down.weight", up="lora_up.weight", rank=4):
    seed = sum(module.encode())
    return {f"{module}.{down}": random(rank, columns, seed=seed), f"{module}.{up}": random(rows, rank, seed=seed + 1)}


def theirs(function, tensors):
    """What diffusers makes of other names: the product by its own names of modules."""
    from diffusers.loaders import lora_conversion_utils

    found = getattr(lora_conversion_utils, function)(dict(tensors))
    modules = {key.removesuffix(".lora_A.weight") for key in found if key.endswith(".lora_A.weight")}
    return {m.removeprefix("transformer."): found[f"{m}.lora_B.weight"] @ found[f"{m}.lora_A.weight"] for m in modules}


@pytest.mark.parametrize(
    ("prefix", "leaves"),
    [("diffusion_model.layers.0.attention.", ("lora_A.weight", "lora_B.weight")),
     ("diffusion_model.layers.0.attention.", ("lora_down.weight", "lora_up.weight")),
     ("diffusion_model.layers.0.attention.", ("lora.down.weight", "lora.up.weight")),
     ("lora_unet_layers_0_attention_", ("lora_down.weight", "lora_up.weight"))],
)  # fmt: skip
@pytest.mark.parametrize("merged", [False, True])
def test_z_image_equals_diffusers(checkpoint, tmp_path, prefix, leaves, merged):
    flat, dotted = prefix.startswith("lora_"), leaves[0].startswith("lora.")
    if merged and not (dotted or flat):
        pytest.skip("diffusers splits no merged layer of these names; see the next test")
    modules = {"out": 48} | ({"qkv": 144} if merged else {f"to_{x}": 48 for x in "qkv"})
    if leaves[0] == "lora_A.weight":  # nor an alpha of this
        modules = {m.replace("out", "to_out.0") if m == "out" else m: rows for m, rows in modules.items()}
    if flat:  # where diffusers knows neither merged layers nor "out"
        modules = {"to_out_0" if m == "out" else m: rows for m, rows in modules.items() if m != "qkv"}
    tensors = {k: t for m, rows in modules.items() for k, t in pairs(prefix + m, rows, 48, *leaves).items()}
    tensors |= {f"{prefix}{m}.alpha": torch.tensor(3.0) for m in modules}
    expected = theirs("_convert_non_diffusers_z_image_lora_to_diffusers", tensors)
    adapter = Adapter(written(tmp_path / "a.safetensors", tensors), 0.5, checkpoint)
    assert {f"{module}.weight" for module in expected} == set(adapter.changes)
    for module, product in expected.items():
        close(adapter.merge(f"{module}.weight", torch.zeros(48, 48)), 0.5 * product)


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.", "model.diffusion_model.", "lora_unet_", "lora_unet__", "lycoris_"]
)
def test_merged_layers_are_split_by_rows(checkpoint, tmp_path, prefix):
    module, out = "layers.1.attention.qkv", "layers.1.attention.out"
    if not prefix.endswith("."):
        module, out = module.replace(".", "_"), out.replace(".", "_")
    tensors = pairs(prefix + module, 144, 48) | pairs(prefix + out, 48, 48)
    tensors[f"{prefix}{module}.alpha"] = torch.tensor(2.0)
    adapter = Adapter(written(tmp_path / "a.safetensors", tensors), 1.0, checkpoint)
    a, b = pairs(prefix + module, 144, 48).values()
    for x, rows in zip("qkv", (b @ a / 2).chunk(3), strict=True):
        close(adapter.merge(f"layers.1.attention.to_{x}.weight", torch.zeros(48, 48)), rows)
    assert "layers.1.attention.to_out.0.weight" in adapter


def test_of_duplicates_the_own_names_count(checkpoint, tmp_path):
    at = "diffusion_model.layers.0.attention."
    single = pairs(f"{at}to.k", 48, 48, "lora.down.weight", "lora.up.weight")
    tensors = single | pairs(f"{at}qkv", 144, 48, "lora.down.weight", "lora.up.weight")
    adapter = Adapter(written(tmp_path / "a.safetensors", tensors), 1.0, checkpoint)
    a, b = single.values()
    close(adapter.merge(NAME, torch.zeros(48, 48)), b @ a)
    assert adapter.changes[NAME].parts == 1 and adapter.changes[NAME.replace("_k", "_q")].parts == 3


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_layers_of_original_files_are_found(kind, prefix, tmp_path):
    """An adapter of every layer by its original name changes what the renamed tensors are: rows, halves and all."""
    rules, text = RULES[kind]
    original = {name: t for name, t in shapes(text).items() if name.endswith(".weight") and t.ndim > 1}
    wanted = ours(rules, shapes(text))
    base = Checkpoint.of(wanted, {"_class_name": kind, "num_layers": 2}, "m")
    tensors, deltas = {}, {}
    for name, weight in original.items():
        module = name.removesuffix(".weight")
        module = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        made = pairs(module, len(weight), weight[0].numel())
        tensors |= made
        deltas[name] = (made[f"{module}.lora_up.weight"] @ made[f"{module}.lora_down.weight"]).reshape(weight.shape)
    adapter = Adapter(written(tmp_path / "a.safetensors", tensors), 1.0, base)
    expected = ours(rules, deltas)
    assert set(adapter.changes) == set(expected)
    for name, delta in expected.items():
        close(adapter.merge(name, torch.zeros_like(wanted[name])), delta)


def lokr(first, second):
    parts = {"w1": random(6, 4, seed=1), "w2": random(8, 12, seed=2)}
    made = {}
    for name, whole in (("w1", first), ("w2", second)):
        rows, columns = parts[name].shape
        cut = {f"lokr_{name}_a": random(rows, 2, seed=3), f"lokr_{name}_b": random(2, columns, seed=4)}
        made |= {f"lokr_{name}": parts[name]} if whole else cut
    return made


A, B, W = random(3, 48), random(48, 3, seed=1), {f"hada_w{i}_{x}": random(*s, seed=i) for i in (1, 2)
                                                  for x, s in (("a", (48, 3)), ("b", (3, 48)))}  # fmt: skip
LORA = {"lora_A.weight": A, "lora_B.weight": B}
MAGNITUDE = random(48).abs() + 1


def published(tensors, base, weight, alpha):
    """W' in float64, by the papers' formulas."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    if "lora_A.weight" in t:
        delta = alpha / 3 * (t["lora_B.weight"] @ t["lora_A.weight"])
    elif "hada_w1_a" in t:
        delta = alpha / 3 * (t["hada_w1_a"] @ t["hada_w1_b"] * (t["hada_w2_a"] @ t["hada_w2_b"]))
    elif "diff" in t:
        delta = t["diff"]
    else:
        whole = [t.get(f"lokr_{x}") for x in ("w1", "w2")]
        made = [t[f"lokr_w{i}_a"] @ t[f"lokr_w{i}_b"] if w is None else w for i, w in enumerate(whole, 1)]
        delta = torch.kron(*made) * (alpha / 2 if any(w is None for w in whole) else 1)
    if "lora_magnitude_vector" in t:
        total = base + weight * delta
        return t["lora_magnitude_vector"][:, None] * total / total.norm(dim=1, keepdim=True)
    if (magnitude := t.get("dora_scale")) is not None:
        total = base + delta
        total = magnitude * total / total.norm(dim=int(magnitude.shape[0] > 1), keepdim=True)
        return base + weight * (total - base)
    return base + weight * delta


KINDS = {
    "LoRA": LORA, "LoHa": W, "difference": {"diff": random(48, 48)}, "LoKr": lokr(True, True),
    "LoKr of a cut second": lokr(True, False), "LoKr of a cut first": lokr(False, True),
    "LoKr of cut ones": lokr(False, False), "DoRA": LORA | {"lora_magnitude_vector": MAGNITUDE},
    "DoRA of rows": LORA | {"dora_scale": MAGNITUDE[:, None]},
    "DoRA of columns": LORA | {"dora_scale": MAGNITUDE[None]},
    "DoRA of LoHa": W | {"dora_scale": MAGNITUDE[:, None]},
}  # fmt: skip


@pytest.mark.parametrize("weight", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_equal_their_formulas(checkpoint, tmp_path, kind, weight):
    tensors = {f"transformer.layers.0.attention.to_k.{end}": t for end, t in KINDS[kind].items()}
    tensors["transformer.layers.0.attention.to_k.alpha"] = torch.tensor(1.5)
    merged = Merged(checkpoint.folder, [(written(tmp_path / "a.safetensors", tensors), weight)])
    close(merged.get(NAME), published(KINDS[kind], checkpoint.get(NAME).double(), weight, 1.5))


def test_factors_in_scaled_float8(checkpoint, tmp_path):
    tensors, exact = {}, []
    for end, factor in LORA.items():
        key, scale = f"transformer.layers.0.attention.to_k.{end}", factor.abs().max() / 448
        tensors |= {key: (factor / scale).to(torch.float8_e4m3fn), f"{key}_scale": scale}
        exact.append(tensors[key].double() * scale.double())
    adapter = Adapter(written(tmp_path / "a.safetensors", tensors), 1.0, checkpoint)
    close(adapter.merge(NAME, torch.zeros(48, 48)), exact[1] @ exact[0])


def test_gguf_files_of_adapters(checkpoint, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "z_image")
    for end, factor in LORA.items():
        writer.add_tensor(f"layers.0.attention.to_k.{end}", factor.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    close(Adapter(tmp_path / "a.gguf", 1.0, checkpoint).merge(NAME, torch.zeros(48, 48)), B @ A)


def test_biases(tmp_path):
    base = Checkpoint.of({"x.weight": random(6, 4), "x.bias": random(6)}, {}, "m")
    tensors = {"x.lora_A.weight": random(2, 4), "x.lora_B.weight": random(6, 2), "x.alpha": torch.tensor(1.0)}
    bias = random(6, seed=5)
    for key, scale in (("x.diff_b", 1.0), ("x.lora_B.bias", 0.5)):
        adapter = Adapter(written(tmp_path / "a.safetensors", tensors | {key: bias}), 2.0, base)
        close(adapter.merge("x.bias", base.get("x.bias")), base.get("x.bias") + 2 * scale * bias)
    with pytest.raises(CheckpointError, match=r"x.diff_b has \(5,\), and x.bias has 6; for another model"):
        Adapter(written(tmp_path / "a.safetensors", tensors | {"x.diff_b": bias[:5]}), 2.0, base)


@pytest.mark.parametrize("key", ["text_encoder.model.layers.0.q_proj.lora_A.weight", "lora_te1_x.lora_down.weight",
                                 "text_encoders.qwen3.x.lora_up.weight"])  # fmt: skip
def test_text_encoders_are_left_out_and_said_to_be(checkpoint, tmp_path, key):
    tensors = {f"transformer.layers.0.attention.to_k.{end}": t for end, t in LORA.items()}
    path = written(tmp_path / "a.safetensors", tensors | {key: A})
    assert Merged(checkpoint.folder, [(path, 1.0)]).notes == (
        "a.safetensors: its 1 tensors of text encoders are left out",
    )
    with pytest.raises(CheckpointError, match=r"holds no LoRA tensors .*, but 1 tensors of text encoders"):
        Adapter(written(tmp_path / "b.safetensors", {key: A}), 1.0, checkpoint)


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [(r"layers\.\d\.attention\.to_k", True), ("to_k", True), ("o_k", False), ("^layers.0.attention.to_k", True),
     ("^attention.to_k", False)],
)  # fmt: skip
def test_patterns_match_as_in_peft(checkpoint, tmp_path, pattern, hit):
    tensors = {f"transformer.layers.0.attention.to_k.{end}": t for end, t in LORA.items()}
    header = json.dumps({"r": 3, "lora_alpha": 3, "alpha_pattern": {pattern: 6}})
    path = written(tmp_path / "a.safetensors", tensors, metadata={"lora_adapter_metadata": header})
    assert Adapter(path, 1.0, checkpoint).changes[NAME].scale == (2.0 if hit else 1.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"oft_blocks": A}, "but OFT, which rotates weights"), ({"lora_mid.weight": A}, "but Tucker factors"),
     ({"ia3_l.weight": A}, r"but \(IA\)3"), ({"set_weight": A}, "but a replaced weight"),
     ({"hada_w1_a": A, "hada_w1_b": A, "hada_w2_a": A}, "lacks hada_w2_b"), ({"lokr_w1": A}, "lacks lokr_w2"),
     ({**LORA, "diff": A}, ": several kinds"), ({"alpha": A}, "lacks lora_A"),
     ({**LORA, "dora_scale": random(5, 1)}, r"has \(5, 1\), not one for each row"),
     ({"lokr_w1": A, "lokr_w2": A}, r"has w1 \(3, 48\) and w2 \(3, 48\), which do not make the \(48, 48\)"),
     ({"diff": A}, "which do not make"), ({"lora_A.weight": A, "lora_B.weight": B.long()}, "is stored as I64")],
)  # fmt: skip
def test_what_cannot_be_merged_is_named(checkpoint, tmp_path, keys, message):
    tensors = {f"transformer.layers.0.attention.to_k.{end}": tensor for end, tensor in keys.items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        Adapter(written(tmp_path / "a.safetensors", tensors), 1.0, checkpoint)
    assert "a.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_inspect_tells_of_an_adapter(tmp_path, capsys, checkpoint):
    modules = [f"diffusion_model.layers.{i}.attention.qkv" for i in (0, 3)]
    tensors = {key: tensor for module in modules for key, tensor in pairs(module, 11520, 3840).items()}
    path = written(tmp_path / "a.safetensors", tensors | {"lora_te_x.lora_up.weight": A})
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "family": "z-image", "kind": "LoRA (2)", "rank": "4 (2)", "alpha": "None (2)",
        "targets": "diffusion_model.layers.N.attention.qkv (2)", "bytes": path.stat().st_size,
        "left out": "1 tensors of text encoders",
    }  # fmt: skip
    assert not any(map(is_adapter, (checkpoint.folder, *checkpoint.paths)))
    assert [*AdapterFile(path).modules] == modules
    assert Targets({}, names.Names()).find("x") is None
