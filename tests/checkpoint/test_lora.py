"""Adapters merged while loading: the formula, every naming, swapping, and refusals by name."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import WEIGHTS, make_model
from tests.networks import inputs, relative, run_step, save
from tests.qwen_image_factory import SHAPES, SMALL, TwinFlowReference
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.lora import Adapter, Merged, resolve_loras
from twinflow_rt.compile import Recipe, compile_network
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.families import qwen_image
from twinflow_rt.loading import load

CPU, ONE, FOUR = torch.device("cpu"), ((1.0, 0.0),), ((0.999, 0.0), (0.75, 0.0), (0.5, 0.5), (0.25, 0.1))
TARGETS = ("layers.0.attention.to_k", "layers.1.feed_forward.w2", "layers.0.adaLN_modulation.0", "t_embedder.mlp.2")
ARGS = {"height": 16, "width": 24, "seed": 3, "output": "np"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("lora") / "m")


@pytest.fixture(scope="module")
def checkpoint(model):
    return Checkpoint(model / "transformer")


def factors(checkpoint, modules=TARGETS, rank=3, seed=0, size=0.5):
    """Module -> (A, B), random; B A has about the size of the weight."""
    g = torch.Generator().manual_seed(seed)
    shapes = {m: checkpoint.shape(m + ".weight") for m in modules}
    return {
        m: (torch.randn(rank, columns, generator=g) * size * columns**-0.5, torch.randn(rows, rank, generator=g) * size)
        for m, (rows, columns) in shapes.items()
    }


def write(path, pairs, name="transformer.{}.lora_{}.weight", metadata=None, alphas=None):
    tensors = {name.format(m, x): t for m, pair in pairs.items() for x, t in zip("AB", pair, strict=True)}
    tensors |= {key: torch.tensor(alpha) for key, alpha in (alphas or {}).items()}
    save_file(tensors, path, metadata=metadata)
    return path


def merged_files(model, folder, *adapters):
    """The model with `adapters`, (factors, scale) each, added to its weights in float64 by hand."""
    shutil.copytree(model, folder)
    path = folder / "transformer" / WEIGHTS
    tensors = load_file(path)
    for pairs, scale in adapters:
        for module, (a, b) in pairs.items():
            name = module + ".weight"
            tensors[name] = (tensors[name].double() + scale * b.double() @ a.double()).to(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merges_in_float32_and_rounds_once(checkpoint, tmp_path, dtype):
    first, second = factors(checkpoint), factors(checkpoint, TARGETS[:2], rank=5, seed=1)
    loras = [(write(tmp_path / "a.safetensors", first), 0.7), (write(tmp_path / "b.safetensors", second), -1.5)]
    merged = Merged(checkpoint.folder, loras)
    for module in TARGETS:
        name = module + ".weight"
        exact = checkpoint.get(name).double()
        for pairs, (_, weight) in zip((first, second), loras, strict=True):
            if module in pairs:
                a, b = (t.double() for t in pairs[module])
                exact += weight * b @ a
        got = merged.get(name, dtype=dtype)
        half_ulp = exact.abs() * torch.finfo(dtype).eps / 2
        assert got.dtype == dtype and ((got.double() - exact).abs() <= half_ulp + 1e-6).all()
    untouched = "layers.0.attention.to_q.weight"
    assert torch.equal(merged.get(untouched), checkpoint.get(untouched))
    assert [str(lora) for lora in merged.loras] == ["a.safetensors x 0.7", "b.safetensors x -1.5"]


def test_reading_leaves_the_mapped_file_alone(checkpoint, tmp_path):
    path = write(tmp_path / "a.safetensors", factors(checkpoint))
    merged, name = Merged(checkpoint.folder, [(path, 1.0)]), TARGETS[0] + ".weight"
    assert torch.equal(merged.get(name), merged.get(name)) and not torch.equal(merged.get(name), checkpoint.get(name))


NAMINGS = {
    "diffusers": "transformer.{}.lora_{}.weight", "bare": "{}.lora_{}.weight",
    "peft": "base_model.model.{}.lora_{}.weight",
    "peft with its adapter's name": "base_model.model.{}.lora_{}.default.weight",
    "peft with another name": "transformer.{}.lora_{}.default_0.weight",
    "original": "diffusion_model.{}.lora_{}.weight",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMINGS.values(), ids=NAMINGS.keys())
def test_namings(checkpoint, tmp_path, name):
    pairs = factors(checkpoint)
    check_scale(checkpoint, write(tmp_path / "a.safetensors", pairs, name), pairs, 1.0)


def check_scale(checkpoint, path, pairs, scale):
    adapter = Adapter(path, 0.5, checkpoint)
    for module, (a, b) in pairs.items():
        base = torch.zeros(len(b), a.shape[1])
        expected = 0.5 * (scale[module] if isinstance(scale, dict) else scale) * (b @ a)
        assert relative(adapter.merge(module + ".weight", base), expected) < 1e-6, module


@pytest.mark.parametrize("suffixes", [("lora_down", "lora_up"), ("lora.down", "lora.up")])
@pytest.mark.parametrize("flat", [False, True])
def test_older_names_with_alphas(checkpoint, tmp_path, suffixes, flat):
    pairs = factors(checkpoint)
    module = {m: "lora_unet_" + m.replace(".", "_") if flat else "transformer." + m for m in pairs}
    tensors = {f"{module[m]}.{s}.weight": t for m, p in pairs.items() for s, t in zip(suffixes, p, strict=True)}
    alphas = {m: 1.5 + i for i, m in enumerate(pairs)}
    save_file(tensors | {f"{module[m]}.alpha": torch.tensor(x) for m, x in alphas.items()}, tmp_path / "a.safetensors")
    check_scale(checkpoint, tmp_path / "a.safetensors", pairs, {m: x / 3 for m, x in alphas.items()})


CONFIGS = [
    ({"r": 3, "lora_alpha": 6}, {}, 2.0), ({"r": 3, "lora_alpha": 6, "use_rslora": True}, {}, 6 / math.sqrt(3)),
    ({"r": 3, "lora_alpha": 6, "alpha_pattern": {TARGETS[0]: 1.5}}, {TARGETS[0]: 0.5}, 2.0),
    ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"^" + TARGETS[1]: 9, "w2": 1}}, {TARGETS[1]: 3.0}, 2.0),
    ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"attention.to_k": 3}}, {TARGETS[0]: 1.0}, 2.0),
]  # fmt: skip


@pytest.mark.parametrize(("config", "special", "scale"), CONFIGS)
@pytest.mark.parametrize("where", ["header", "header of one part", "beside", "beside another name"])
def test_alpha_from_the_configuration(checkpoint, tmp_path, config, special, scale, where):
    pairs = factors(checkpoint)
    expected = dict.fromkeys(pairs, scale) | special
    if where.startswith("header"):  # diffusers' save_lora_weights, and save_lora_adapter of the network alone
        header = {f"transformer.{k}": v for k, v in config.items()} | {"text_encoder.lora_alpha": 99}
        header = config if where == "header of one part" else header
        path = write(tmp_path / "a.safetensors", pairs, metadata={"lora_adapter_metadata": json.dumps(header)})
    else:
        file = "adapter_model" if where == "beside" else "my_style"
        path = write(tmp_path / f"{file}.safetensors", pairs, NAMINGS["peft"])
        path = path.parent if where == "beside" else path
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    check_scale(checkpoint, path, pairs, expected)


@pytest.mark.parametrize("nfe", [1, 4])
def test_loads_swaps_and_unmerges(model, checkpoint, tmp_path, nfe):
    """Modulation and time embedder included: as if the files had been merged before they were read."""
    first, second = factors(checkpoint), factors(checkpoint, TARGETS[1:], seed=1)
    a, b = write(tmp_path / "a.safetensors", first), write(tmp_path / "b.safetensors", second)
    pipe = load(model, device="cpu", nfe=nfe, loras=[(a, 0.5), (b, -0.25)])
    expected = load(merged_files(model, tmp_path / "ab", (first, 0.5), (second, -0.25)), device="cpu", nfe=nfe)
    for name, tensor in expected.program.network.state_dict().items():
        assert torch.allclose(pipe.program.network.state_dict()[name], tensor, rtol=1e-5, atol=1e-6), name
    assert "lora         a.safetensors x 0.5\nlora         b.safetensors x -0.25" in str(pipe.plan)
    assert_same_images(pipe, expected)
    plain = load(model, device="cpu", nfe=nfe)
    for loras, other in (({b: 2.0}, load(model, device="cpu", nfe=nfe, loras={b: 2.0})), ([], plain)):
        pipe.set_loras(loras)
        fresh = other.program.network.state_dict()
        assert all(torch.equal(fresh[k], v) for k, v in pipe.program.network.state_dict().items())
        assert pipe.plan.loras == other.plan.loras


def assert_same_images(pipe, other):
    got, wanted = (p("a red circle", **ARGS).images.astype(int) for p in (pipe, other))
    assert np.abs(got - wanted).max() <= 1


def test_a_refused_swap_changes_nothing(model, checkpoint, tmp_path):
    pipe = load(model, device="cpu", loras=[write(tmp_path / "a.safetensors", factors(checkpoint))])
    before, plan = pipe("a red circle", **ARGS).images, pipe.plan
    with pytest.raises(CheckpointError, match="does not exist"):
        pipe.set_loras([tmp_path / "none.safetensors"])
    assert pipe.plan == plan and np.array_equal(pipe("a red circle", **ARGS).images, before)


def test_merges_before_absorbing(tmp_path):
    """Qwen-Image at one evaluation: modulation, its time embedders and the layers they end up in."""
    reference = TwinFlowReference()
    modules = (
        "transformer_blocks.0.img_mod.1", "time_text_embed_2.timestep_embedder.linear_2", "norm_out.linear",
        "transformer_blocks.1.attn.to_out.0", "transformer_blocks.0.attn.add_k_proj",
    )  # fmt: skip
    folder = save(tmp_path / "transformer", reference.tensors(), SMALL)
    pairs = factors(Checkpoint(folder), modules)
    path = write(tmp_path / "a.safetensors", pairs)
    args, originals = inputs(SHAPES[-1], SMALL), {k: v.clone() for k, v in reference.tensors().items()}
    program = compile_network(Recipe(Merged(folder, [(path, 0.5)]), qwen_image(), CPU, torch.float32), ONE)
    assert program.plan.absorbed
    with torch.no_grad():
        for module, (a, b) in pairs.items():
            weight = dict(reference.network.named_parameters())[module + ".weight"] if "embed_2" not in module else (
                dict(reference.second.named_parameters())[module.partition(".")[2] + ".weight"])  # fmt: skip
            weight += 0.5 * b @ a
    assert relative(run_step(program.network, args, 0), reference.velocity(args, *ONE[0])) < 1e-5
    program.set_loras(())
    reference.network.load_state_dict({k: v for k, v in originals.items() if "embed_2" not in k})
    reference.second.load_state_dict(
        {k.partition(".")[2]: v for k, v in originals.items() if k.startswith("time_text_embed_2")}
    )
    assert relative(run_step(program.network, args, 0), reference.velocity(args, *ONE[0])) < 1e-5


def test_artifacts_keep_their_adapters(model, checkpoint, tmp_path):
    pairs = factors(checkpoint)
    path = write(tmp_path / "a.safetensors", pairs)
    other = write(tmp_path / "b.safetensors", factors(checkpoint, seed=1))
    pipe = load(model, device="cpu", loras={path: 0.5})
    saved = pipe.save(tmp_path / "artifact")
    renamed = shutil.copy(path, tmp_path / "renamed.safetensors")
    for loras in (None, {path: 0.5}, {renamed: 0.5}):
        again = load(saved, device="cpu", loras=loras)
        assert again.plan.loras == pipe.plan.loras
        assert np.array_equal(again("a red circle", **ARGS).images, pipe("a red circle", **ARGS).images)
    for loras in ([], {path: 0.6}, {other: 0.5}, {path: 0.5, other: 1}):
        with pytest.raises(ConfigError, match=r"this artifact has a.safetensors x 0.5 in its weights, not "):
            load(saved, device="cpu", loras=loras)
    with pytest.raises(ConfigError, match="changing them needs the checkpoint"):
        again.set_loras({other: 0.5})
    assert json.loads((saved / "artifact.json").read_text())["plan"]["loras"][0]["sha256"] == pipe.plan.loras[0].sha256
    with pytest.raises(ConfigError, match=r"has no adapter in its weights, not a\.safetensors x 0\.5"):
        load(load(model, device="cpu").save(tmp_path / "plain"), device="cpu", loras={path: 0.5})


def rename(old, new):
    """Replaces `old` in every key."""
    return lambda path: save_file({k.replace(old, new): v for k, v in load_file(path).items()}, path)


def drop(key):
    return lambda path: save_file({k: v for k, v in load_file(path).items() if k != key}, path)


def reshape(path):
    tensors = load_file(path)
    save_file({**tensors, A: tensors[A][:, 1:].contiguous()}, path)


def configure(**config):
    def edit(path):
        header = {f"transformer.{k}": v for k, v in config.items()}
        save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(header)})

    return edit


A = f"transformer.{TARGETS[0]}.lora_A.weight"
REFUSALS = [
    (rename(A, f"transformer.{TARGETS[0]}.lora_magnitude_vector"), "lacks lora_A"),
    (rename(A, f"transformer.{TARGETS[0]}.oft_r"), "oft_r, which is no LoRA factor, but OFT, which rotates weights"),
    (rename("transformer.", "text_encoder."), "8 tensors of text encoders, which are not changed"),
    (rename("layers.0", "layers.7"), "adapts transformer.layers.7.* which .* lacks"),
    (drop(A), f"transformer.{TARGETS[0]} lacks lora_A"),
    (reshape, r"A \(3, 47\) and B \(48, 3\), which do not make the \(48, 48\)"),
    (lambda path: path.write_bytes(path.read_bytes()[:-50]), "truncated or no safetensors"),
    (lambda path: save_file({}, path), "holds no LoRA tensors"),
    (lambda path: path.unlink(), "does not exist"),
    (configure(use_dora=True), "is a DoRA adapter's and lacks lora_magnitude_vector"),
    (configure(peft_type="OFT"), "is an adapter of type 'OFT'; LoRA, LoHa and LoKr are merged"),
    (configure(init_lora_weights="pissa_niter_4"), "began as 'pissa_niter_4', which changed the base weights"),
    (configure(lora_alpha="8"), "the alpha of transformer.layers.0.* is '8', not a finite number"),
    (lambda path: save_file({**load_file(path), A.replace("lora_A.weight", "alpha"): torch.tensor(float("inf"))}, path),
     "is inf, not a finite number"),
    (configure(alpha_pattern={"(layers.*)+.to_k": 2}), "is a regular expression with groups"),
    (lambda path: save_file(load_file(path), path, metadata={"lora_adapter_metadata": "{"}), "not readable JSON"),
    (lambda path: save_file({**load_file(path), A.replace("transformer.", ""): torch.ones(3, 48),
                             A.replace("transformer.", "").replace("_A", "_B"): torch.ones(48, 3)}, path),
     "two adapters for layers.0.attention.to_k"),
    (lambda path: save_file({k.replace(".weight", f".{name}.weight"): v.clone() for k, v in load_file(path).items()
                             for name in ("default_0", "default_1")}, path),
     r"holds several adapters \(default_0, default_1\); save each in its own file"),
    (lambda path: path.write_bytes(b"GGUF" + bytes(64)), "is a GGUF file; these are read as a network's weights"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), REFUSALS)
def test_what_is_wrong_is_named(model, checkpoint, tmp_path, damage, message):
    path = write(tmp_path / "a.safetensors", factors(checkpoint))
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(model, device="cpu", loras=[path])
    assert "a.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_pickles_are_never_opened(checkpoint, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        Adapter(path, 1.0, checkpoint)
    with pytest.raises(CheckpointError, match=r"holds only pickles \(a.bin\), which can run code"):
        Adapter(tmp_path, 1.0, checkpoint)


@pytest.mark.parametrize(
    "place",
    ["adapter_model.safetensors", "style.safetensors", "default_0/adapter_model.safetensors", "a/x.safetensors"],
)
def test_folders_that_hold_one_adapter(checkpoint, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    pairs = factors(checkpoint)
    write(tmp_path / place, pairs, NAMINGS["peft"])
    (tmp_path / place).with_name("adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    check_scale(checkpoint, tmp_path, pairs, 2.0)


@pytest.mark.parametrize(
    ("names", "message"),
    [(("a/x.safetensors", "b/x.safetensors"), "holds a/x.safetensors, b/x.safetensors; name the one to merge"),
     (("x.safetensors", "y.safetensors"), "holds x.safetensors, y.safetensors; name"), ((), "holds no adapter; give")],
)  # fmt: skip
def test_folders_that_hold_none_or_several(checkpoint, tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, factors(checkpoint))
    with pytest.raises(CheckpointError, match=message):
        Adapter(tmp_path, 1.0, checkpoint)


@pytest.mark.parametrize("bad", ["a", [("a", float("nan"))], [("a", "b")], [("a", 1, 2)], {"a": True}, [3]])
def test_arguments_that_cannot_work(bad):
    with pytest.raises(ConfigError, match="loras"):
        resolve_loras(bad)
