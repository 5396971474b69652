"""Conversion of original file layouts, against diffusers' own converters."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import factory, qwen_image_factory
from twinflow_rt import cli
from twinflow_rt.checkpoint import shards
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.layout import Layout
from twinflow_rt.convert import convert, files
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.loading import DEMO, load
from twinflow_rt.single_files import names
from twinflow_rt.single_files.networks import Converted
from twinflow_rt.single_files.report import Key
from twinflow_rt.single_files.sources import Source

WEIGHTS = factory.WEIGHTS
ARGS = {"height": 16, "width": 32, "seed": 0, "output": "np"}


@pytest.fixture(scope="module")
def z_image(tmp_path_factory):
    return factory.make_model(tmp_path_factory.mktemp("z") / "m")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return qwen_image_factory.make_model(tmp_path_factory.mktemp("q") / "m")


# -- original layouts, made from diffusers' by rules of their own --------------------------------------


def comfy_z_image(tensors):
    """Fused attention, the authors' names, ComfyUI's container, and a norm that nothing reads."""
    out = {"model.diffusion_model.norm_final.weight": torch.ones(factory.DIM)}
    for name, tensor in tensors.items():
        if ".attention.to_q." in name:
            tensor = torch.cat([tensors[name.replace("to_q", f"to_{x}")] for x in "qkv"])
            name = name.replace("to_q", "qkv")
        elif re.search(r"attention\.to_[kv]\.", name):
            continue
        for new, old in (("all_x_embedder.2-1.", "x_embedder."), ("all_final_layer.2-1.", "final_layer."),
                         ("attention.to_out.0.", "attention.out."), ("attention.norm_q.", "attention.q_norm."),
                         ("attention.norm_k.", "attention.k_norm.")):  # fmt: skip
            name = name.replace(new, old)
        out["model.diffusion_model." + name] = tensor
    return out


def ldm_vae(tensors, levels=3):
    out = {}
    for name, tensor in tensors.items():
        if "attentions.0.to_" in name and name.endswith("weight"):
            tensor = tensor[..., None, None]
        name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
        for new, old in (("down_blocks.", "down."), (".resnets.", ".block."), (".downsamplers.0.", ".downsample."),
                         (".upsamplers.0.", ".upsample."), ("conv_shortcut", "nin_shortcut"),
                         ("conv_norm_out", "norm_out"), ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
                         ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
                         ("mid_block.attentions.0.to_", "mid.attn_1.")):  # fmt: skip
            name = name.replace(new, old)
        out[name] = tensor.contiguous()
    return out


LAYERS = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
          "conv_shortcut": "shortcut"}  # fmt: skip


def wan_vae(tensors, per_level=3):
    out = {}
    for name, tensor in tensors.items():
        name = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)\.",
                      lambda m: f"decoder.upsamples.{int(m[1]) * per_level + int(m[2])}.", name)  # fmt: skip
        name = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.",
                      lambda m: f"decoder.upsamples.{(int(m[1]) + 1) * per_level - 1}.", name)  # fmt: skip
        name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"middle.{2 * int(m[1])}.", name)
        for new, old in (("mid_block.attentions.0.", "middle.1."), ("encoder.down_blocks.", "encoder.downsamples."),
                         ("coder.conv_in.", "coder.conv1."), ("coder.conv_out.", "coder.head.2."),
                         ("coder.norm_out.", "coder.head.0."), ("post_quant_conv.", "conv2."),
                         ("quant_conv.", "conv1.")):  # fmt: skip
            name = name.replace(new, old)
        parts = name.split(".")
        inside = "middle" in parts or "upsamples" in parts or "downsamples" in parts
        out[".".join(LAYERS.get(p, p) if inside else p for p in parts)] = tensor
    return out


def written(folder, part):
    return load_file(folder / part / WEIGHTS)


def to_file(path, tensors):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def same_images(*folders):
    assert np.array_equal(*(load(folder, device="cpu")("a red square", **ARGS).images for folder in folders))


# -- whole conversions ----------------------------------------------------------------------------------


def test_z_image_from_comfyui_files(z_image, tmp_path):
    """Network and VAE from single files give the model they came from, image for image."""
    network, vae = written(z_image, "transformer"), written(z_image, "vae")
    sources = [
        to_file(tmp_path / "net.safetensors", comfy_z_image(network)),
        to_file(tmp_path / "ae.safetensors", ldm_vae(vae)),
    ]
    done = convert(sources, z_image, tmp_path / "out")
    for part, tensors in (("transformer", network), ("vae", vae)):
        same(written(tmp_path / "out", part), tensors)
    assert done.copied == ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    actions = {k.source.removeprefix("model.diffusion_model."): k.action for k in done.parts[0].keys}
    assert actions["norm_final.weight"] == "dropped"
    assert actions["layers.0.attention.qkv.weight"] == "split"
    assert actions["x_embedder.weight"] == "renamed"
    same_images(z_image, tmp_path / "out")


def test_qwen_image_from_comfyui_files(qwen, tmp_path):
    network, vae = written(qwen, "transformer"), written(qwen, "vae")
    text = load_file(qwen / "text_encoder" / "model.safetensors")
    sources = [
        to_file(tmp_path / "net.safetensors", {"model.diffusion_model." + k: v for k, v in network.items()}),
        to_file(tmp_path / "vae.safetensors", wan_vae(vae)),
        to_file(tmp_path / "text.safetensors", text),
    ]
    assert "decoder.upsamples.2.resample.1.weight" in wan_vae(vae)
    done = convert(sources, qwen, tmp_path / "out")
    assert [p.part for p in done.parts] == ["transformer", "vae", "text_encoder"]
    same(written(tmp_path / "out", "vae"), vae)
    same_images(qwen, tmp_path / "out")


def test_one_file_with_everything(z_image, tmp_path):
    text = load_file(z_image / "text_encoder" / "model.safetensors")
    whole = {
        **comfy_z_image(written(z_image, "transformer")),
        **{"vae." + k: v for k, v in ldm_vae(written(z_image, "vae")).items()},
        **{"text_encoders.qwen3_4b.transformer." + k: v for k, v in text.items()},
    }
    done = convert([to_file(tmp_path / "all.safetensors", whole)], z_image, tmp_path / "out")
    assert {p.part for p in done.parts} == {"transformer", "vae", "text_encoder"}
    same_images(z_image, tmp_path / "out")


def test_several_text_encoders_are_told_apart(tmp_path):
    """Two CLIP towers of different depth and T5 in ComfyUI's containers, a temperature beside each."""
    from tests.sd3_factory import make_model

    base = make_model(tmp_path / "m")
    whole = {}
    for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl")):
        tensors = load_file(base / part / "model.safetensors")
        whole |= {f"text_encoders.{name}.transformer.{k}": v for k, v in tensors.items()}
        whole[f"text_encoders.{name}.logit_scale"] = torch.ones(1)
    whole["text_encoders.t5xxl.spiece_model"] = torch.zeros(9, dtype=torch.uint8)
    done = convert([to_file(tmp_path / "all.safetensors", whole)], base, tmp_path / "out")
    assert sorted(p.part for p in done.parts) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        same(*(load_file(f / part / "model.safetensors") for f in (tmp_path / "out", base)))


def test_openuni_from_its_whole_file(tmp_path):
    """Network, language model and connector under the names of its training, beside each other."""
    from tests.sana_factory import make_openuni

    base, connector = make_openuni(tmp_path / "m")
    text = load_file(base / "text_encoder" / "model.safetensors")
    whole = {f"transformer.{k}": v for k, v in written(base, "transformer").items()} | connector
    whole |= {f"lmm.language_model.{k}": v for k, v in text.items()}
    done = convert([to_file(tmp_path / "all.safetensors", whole)], base, tmp_path / "out")
    assert sorted(p.part for p in done.parts) == ["connector", "text_encoder", "transformer"]
    same_images(base, tmp_path / "out")


def wrapped(prefix, second="", rest=lambda name: name.startswith("t_embedder_2.")):
    return lambda tensors: {(second if rest(k) and second else prefix) + k: v for k, v in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [wrapped("transformer."), wrapped("extended_weights."), wrapped("transformer.", "extended_weights."),
     wrapped("", "extended_weights."), wrapped("model.diffusion_model.transformer."), wrapped("module._orig_mod.")],
)  # fmt: skip
def test_prefixes_of_training_and_of_other_tools(z_image, tmp_path, change):
    network = written(z_image, "transformer")
    convert([to_file(tmp_path / "net.safetensors", change(network))], z_image, tmp_path / "out")
    same(written(tmp_path / "out", "transformer"), network)


def fuse(tensors, merged, *parts):
    """Stack `parts` of every module into `merged`, as names' last components but the leaf."""
    out = dict(tensors)
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if module.endswith("." + parts[0]):
            stem = module.removesuffix(parts[0])
            each = [f"{stem}{part}.{leaf}" for part in parts]
            if all(key in out for key in each):
                out[f"{stem}{merged}.{leaf}"] = torch.cat([out.pop(key) for key in each])
    return out


@pytest.mark.parametrize("family", ["z-image", "qwen-image", "sd3", "sana"])
def test_projections_that_diffusers_has_fused(tmp_path, family):
    base = factory.make_model(tmp_path / "m", family)
    network, vae = written(base, "transformer"), written(base, "vae")
    fused = fuse(fuse(network, "to_qkv", "to_q", "to_k", "to_v"), "to_added_qkv", *(f"add_{x}_proj" for x in "qkv"))
    fused = fuse(fused, "to_kv", "to_k", "to_v")  # where queries have another width
    assert fused.keys() != network.keys()
    sources = [to_file(tmp_path / "net.safetensors", fused)]
    if "decoder.mid_block.attentions.0.to_q.weight" in vae:
        sources.append(to_file(tmp_path / "vae.safetensors", fuse(vae, "to_qkv", "to_q", "to_k", "to_v")))
    convert(sources, base, tmp_path / "out")
    same(written(tmp_path / "out", "transformer"), network)
    same(written(tmp_path / "out", "vae"), vae)


def test_z_image_with_diffusers_feed_forward(z_image, tmp_path):
    """The SwiGLU of diffusers' FeedForward, as tools put it in place of Z-Image's own: the gate is the second half."""
    from diffusers.models.attention import FeedForward

    network = written(z_image, "transformer")
    fused = {k.replace("feed_forward.w2.", "feed_forward.net.2."): v for k, v in network.items()}
    fused = fuse(fused, "net.0.proj", "w3", "w1")
    stem, x = "layers.0.feed_forward.", torch.randn(5, factory.DIM)
    w1, w2, w3 = (network[f"{stem}w{i}.weight"] for i in (1, 2, 3))
    theirs = FeedForward(len(x.T), activation_fn="swiglu", inner_dim=len(w1), bias=False)
    theirs.load_state_dict({k.removeprefix(stem): v for k, v in fused.items() if k.startswith(stem)})
    own = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    assert torch.allclose(theirs(x), own, rtol=1e-4, atol=1e-5)
    convert([to_file(tmp_path / "net.safetensors", fused)], z_image, tmp_path / "out")
    same(written(tmp_path / "out", "transformer"), network)


def test_the_shipped_model_as_base(tmp_path, capsys):
    base = DEMO
    file = to_file(tmp_path / "net.safetensors", comfy_z_image(written(base, "transformer")))
    assert cli.main(["convert", str(file), str(tmp_path / "out"), "--base", "demo"]) == 0
    same(written(tmp_path / "out", "transformer"), written(base, "transformer"))


def test_variants_and_tied_weights_of_a_folder(z_image, tmp_path):
    """Of an index's shards and a variant's beside them, the plain ones; of a text encoder, the head for the embeddings;
    tensors that inference does not read keep any dtype."""
    text = load_file(z_image / "text_encoder" / "model.safetensors")
    text["lm_head.weight"] = text.pop("embed_tokens.weight")
    text["layers.3.counter"] = torch.arange(3)
    folder, base = tmp_path / "text", shutil.copytree(z_image, tmp_path / "base")
    config = json.loads((base / "text_encoder" / "config.json").read_text())
    (base / "text_encoder" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    folder.mkdir()
    for value, name, index in ((1, "model-00001-of-00001", "model.safetensors.index"),
                               (2, "model.fp16-00001-of-00001", "model.safetensors.index.fp16")):  # fmt: skip
        to_file(folder / f"{name}.safetensors", {k: v * value for k, v in text.items()})
        weight_map = dict.fromkeys(text, f"{name}.safetensors")
        (folder / f"{index}.json").write_text(json.dumps({"weight_map": weight_map}))
    convert([folder], base, tmp_path / "out")
    same(load_file(tmp_path / "out" / "text_encoder" / "model.safetensors"), text)
    shutil.copy(tmp_path / "out" / "vae" / WEIGHTS, tmp_path / "out" / "vae" / f"{WEIGHTS[:-12]}.fp16.safetensors")
    assert len(convert([tmp_path / "out"], base, tmp_path / "whole", dry_run=True).parts) == 3
    same_images(z_image, tmp_path / "out")


def test_large_networks_are_written_in_shards(z_image, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    network = written(z_image, "transformer")
    file = to_file(tmp_path / "net.safetensors", comfy_z_image(network))
    convert([file], z_image, tmp_path / "out")
    folder = tmp_path / "out" / "transformer"
    assert len(list(folder.glob("*.safetensors"))) > 2
    checkpoint = Checkpoint(folder)
    assert all(torch.equal(checkpoint.get(k), v) for k, v in network.items())
    # and shards are read as one network, below a folder
    again = convert([tmp_path / "out" / "transformer"], z_image, tmp_path / "again")
    assert [p.part for p in again.parts] == ["transformer"]
    assert {k.action for k in again.parts[0].keys} == {"kept"}


# -- names, against diffusers' converters --------------------------------------------------------------


def ours(rules, tensors):
    """Names and tensors by our rules alone."""
    out = {}
    for key, tensor in tensors.items():
        targets = rules.targets(key)
        tensor = torch.cat(tensor.chunk(2)[::-1]) if rules.swapped(key) else tensor
        for target, part in zip(targets, tensor.chunk(max(len(targets), 1)), strict=False):
            out[target] = part.squeeze() if rules.matrices and re.search(rules.matrices, target) else part
    return out


def test_z_image_names_equal_diffusers(z_image):
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers as theirs

    original = comfy_z_image(written(z_image, "transformer"))
    bare = {k.removeprefix("model.diffusion_model."): v for k, v in original.items()}
    same(ours(names.z_image({}), bare), theirs(dict(original)))


def test_ldm_names_equal_diffusers():
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint as theirs

    vae = AutoencoderKL(**{**factory.VAE, "use_quant_conv": True, "use_post_quant_conv": True})
    original = ldm_vae(vae.state_dict())
    same(ours(names.ldm_autoencoder(vae.config), original), theirs(dict(original), vae.config))


def test_wan_names_equal_diffusers():
    """Of a VAE with the released number of layers; diffusers' table holds for no other."""
    from diffusers import AutoencoderKLQwenImage
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers as theirs

    config = {**qwen_image_factory.VAE, "num_res_blocks": 2, "dim_mult": [1, 2, 4, 4]}
    original = wan_vae(AutoencoderKLQwenImage(**config).state_dict(), per_level=4)
    same(ours(names.wan_autoencoder(config), original), theirs(dict(original)))


def shapes(text):
    """Random tensors of the names in `text`: "name rows [columns]", {i} for each of two blocks, + for a layer's weight
    and a bias of as many rows."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, *size in (entry.split() for entry in text.split(",")):
        rows, *columns = map(int, size)
        leaves = {".weight": (rows, *columns), ".bias": (rows,)} if name.endswith("+") else {"": (rows, *columns)}
        for i in range(2 if "{i}" in name else 1):
            for leaf, shape in leaves.items():
                out[name.removesuffix("+").format(i=i) + leaf] = torch.randn(shape, generator=generator)
    return out


SD3 = """pos_embed 1 4 8, x_embedder.proj+ 8 2 2, t_embedder.mlp.0+ 8 4, t_embedder.mlp.2+ 8 8, y_embedder.mlp.0+ 8 4,
y_embedder.mlp.2+ 8 8, context_embedder+ 8 6, joint_blocks.{i}.x_block.attn.qkv+ 24 8,
joint_blocks.{i}.x_block.attn.ln_q.weight 4, joint_blocks.{i}.x_block.attn.ln_k.weight 4,
joint_blocks.{i}.x_block.attn.proj+ 8 8, joint_blocks.0.x_block.attn2.qkv+ 24 8,
joint_blocks.0.x_block.attn2.ln_q.weight 4, joint_blocks.0.x_block.attn2.ln_k.weight 4,
joint_blocks.0.x_block.attn2.proj+ 8 8, joint_blocks.{i}.x_block.adaLN_modulation.1+ 48 8,
joint_blocks.{i}.x_block.mlp.fc1+ 32 8, joint_blocks.{i}.x_block.mlp.fc2+ 8 32,
joint_blocks.{i}.context_block.attn.qkv+ 24 8, joint_blocks.{i}.context_block.attn.ln_q.weight 4,
joint_blocks.{i}.context_block.attn.ln_k.weight 4, joint_blocks.0.context_block.attn.proj+ 8 8,
joint_blocks.{i}.context_block.adaLN_modulation.1+ 16 8, joint_blocks.0.context_block.mlp.fc1+ 32 8,
joint_blocks.0.context_block.mlp.fc2+ 8 32, final_layer.linear+ 4 8, final_layer.adaLN_modulation.1+ 16 8"""

SANA = """pos_embed 1 4 8, x_embedder.proj+ 8 2 1 1, t_embedder.mlp.0+ 8 4, t_embedder.mlp.2+ 8 8, t_block.1+ 48 8,
y_embedder.y_embedding 3 6, y_embedder.y_proj.fc1+ 8 6, y_embedder.y_proj.fc2+ 8 8, attention_y_norm.weight 8,
blocks.{i}.scale_shift_table 6 8, blocks.{i}.attn.qkv.weight 24 8, blocks.{i}.attn.proj+ 8 8,
blocks.{i}.cross_attn.q_linear+ 8 8, blocks.{i}.cross_attn.kv_linear+ 16 8, blocks.{i}.cross_attn.proj+ 8 8,
blocks.{i}.mlp.inverted_conv.conv+ 40 8 1 1, blocks.{i}.mlp.depth_conv.conv+ 40 1 3 3,
blocks.{i}.mlp.point_conv.conv.weight 8 20 1 1, final_layer.linear+ 4 8, final_layer.scale_shift_table 2 8"""


@pytest.mark.parametrize(
    ("theirs", "rules", "original"),
    [
        ("convert_sd3_transformer_checkpoint_to_diffusers", names.sd3({"num_layers": 2}), SD3),
        ("convert_sana_transformer_to_diffusers", names.sana({}), SANA),
    ],
)
def test_network_names_equal_diffusers(theirs, rules, original):
    from diffusers.loaders import single_file_utils

    same(ours(rules, shapes(original)), getattr(single_file_utils, theirs)(shapes(original)))


def test_halves_are_swapped_in_the_file_written(tmp_path):
    """Stable Diffusion 3's closing norm: shift | scale becomes scale | shift."""
    file = to_file(tmp_path / "f.safetensors", shapes(SD3))
    slot = SimpleNamespace(rules=names.sd3({"num_layers": 2}), bare=lambda name: name, layout=Layout())
    stored = "final_layer.adaLN_modulation.1.weight"
    key = Key(stored, slot.rules.targets(stored), slot.rules.swapped(stored))
    network = Converted(slot)
    network.add(Source(file), [key])
    shift, scale = shapes(SD3)[stored].chunk(2)
    assert key.action == "swapped"
    assert torch.equal(network.get("norm_out.linear.weight"), torch.cat((scale, shift)))


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], v) for k, v in b.items())


@pytest.mark.parametrize(
    "rules", [names.z_image({}), names.ldm_autoencoder(factory.VAE), names.wan_autoencoder(qwen_image_factory.VAE)]
)
def test_names_that_are_diffusers_already_stay(rules, z_image, qwen):
    part, folder = ("transformer", z_image) if rules.splits else ("vae", z_image if rules.matrices else qwen)
    assert all(rules.targets(k) == (k,) for k in written(folder, part))


# -- refusals -------------------------------------------------------------------------------------------


def drop(*ends):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(ends)}


def shorten(end):
    return lambda tensors: {k: v[:-1] if k.endswith(end) else v for k, v in tensors.items()}


def without_second(tensors):
    return {k: v for k, v in tensors.items() if "t_embedder_2" not in k}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("layers.1.feed_forward.w2.weight"), r"transformer lacks layers\.1\.feed_forward\.w2\.weight"),
        (without_second, "t_embedder_2 is missing: this is a plain Z-Image"),
        (lambda t: {**t, "model.diffusion_model.control.weight": torch.ones(2)}, r"unknown control\.weight"),
        (shorten("cap_embedder.1.bias"), "has shape"),
        (shorten("layers.0.attention.qkv.weight"), "do not split in 3"),
        (lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}, "stored as F8_E4M3; take the file in one of"),
        (lambda t: {**t, "model.diffusion_model.all_x_embedder.2-1.bias": torch.ones(48)}, "are both all_x_embedder"),
        (lambda t: {"something.else": torch.ones(2)}, "belong to none of the base's networks"),
    ],
)
def test_files_of_other_models_are_refused(z_image, tmp_path, change, message):
    file = to_file(tmp_path / "net.safetensors", change(comfy_z_image(written(z_image, "transformer"))))
    with pytest.raises(CheckpointError, match=message):
        convert([file], z_image, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.safetensors"]


def test_impossible_arguments(z_image, tmp_path):
    file = to_file(tmp_path / "net.safetensors", comfy_z_image(written(z_image, "transformer")))
    with pytest.raises(ConfigError, match="a second transformer"):
        convert([file, file], z_image, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists; choose another name"):
        convert([file], z_image, tmp_path)
    with pytest.raises(CheckpointError, match="needs model_index"):
        convert([file], tmp_path, tmp_path / "out")
    (tmp_path / "net.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a pickle"):
        convert([tmp_path / "net.ckpt"], z_image, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors"):
        convert([tmp_path / "empty"], z_image, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is missing"):
        convert([tmp_path / "absent.safetensors"], z_image, tmp_path / "out")


def test_a_failure_leaves_nothing(z_image, tmp_path, monkeypatch):
    file = to_file(tmp_path / "net.safetensors", comfy_z_image(written(z_image, "transformer")))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_shards", full)
    with pytest.raises(OSError, match="No space"):
        convert([file], z_image, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.safetensors"]


def test_command_line(z_image, tmp_path, capsys):
    tensors = comfy_z_image(written(z_image, "transformer"))
    file = to_file(tmp_path / "net.safetensors", tensors)
    argv = ["convert", str(file), str(tmp_path / "out"), "--base", str(z_image)]
    assert cli.main([*argv, "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {k["source"] for k in report["parts"][0]["keys"]} == tensors.keys()
    assert not (tmp_path / "out").exists()
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "model.diffusion_model.norm_final.weight" in printed and "transformer from" in printed
    assert (tmp_path / "out" / "transformer" / WEIGHTS).is_file()


def test_dry_run_reports_before_it_refuses(z_image, tmp_path, capsys):
    file = to_file(tmp_path / "net.safetensors", without_second(comfy_z_image(written(z_image, "transformer"))))
    assert cli.main(["convert", str(file), str(tmp_path / "out"), "--base", str(z_image), "--dry-run"]) == 2
    out = capsys.readouterr()
    assert "missing       4" in out.out and "t_embedder_2.mlp.0.weight" in out.out
    assert "t_embedder_2 is missing: this is a plain Z-Image" in out.err
