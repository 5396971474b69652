"""Conversion of original file layouts, against diffusers' own converters."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import factory
from tests.single_files.layouts import comfy_z_image, fuse, ldm_vae, same, to_file, wan_vae, written
from twinflow_rt import cli
from twinflow_rt.checkpoint import shards
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.convert import conversion, convert
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.loading import DEMO, load

WEIGHTS = factory.WEIGHTS
ARGS = {"height": 16, "width": 32, "seed": 0, "output": "np"}


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


def scaled_fp8(tensors, scaled):
    """ComfyUI's fp8 of the matrices in blocks, their scale under its former or its present name, and what it stands
    for, in bfloat16 as the rest."""
    stored, dense = {}, {}
    for name, tensor in tensors.items():
        stored[name] = dense[name] = tensor.bfloat16()
        if tensor.ndim == 2 and "layers." in name:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + scaled] = scale.reshape(())
            dense[name] = (stored[name].float() * scale).bfloat16()
    return stored, dense


def test_one_file_with_everything_in_scaled_fp8(z_image, tmp_path):
    """It is written dense, and says no more that it is quantized."""
    base = shutil.copytree(z_image, tmp_path / "base")
    config = json.loads((base / "transformer" / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "quanto"}}
    (base / "transformer" / "config.json").write_text(json.dumps(quantized))
    network, dense = scaled_fp8(comfy_z_image(written(z_image, "transformer")), "scale_weight")
    text, dense_text = scaled_fp8(load_file(z_image / "text_encoder" / "model.safetensors"), "weight_scale")
    place = "text_encoders.qwen3_4b.transformer."
    text = {place + name: tensor for name, tensor in text.items()}
    mark = {"model.diffusion_model.scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    convert([to_file(tmp_path / "all.safetensors", {**network, **text, **mark})], base, tmp_path / "out")
    same(load_file(tmp_path / "out" / "text_encoder" / "model.safetensors"), dense_text)
    assert json.loads((tmp_path / "out" / "transformer" / "config.json").read_text()) == config
    convert([to_file(tmp_path / "dense.safetensors", dense)], z_image, tmp_path / "dense")
    same(written(tmp_path / "out", "transformer"), written(tmp_path / "dense", "transformer"))


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
        (without_second, "t_embedder_2 is missing, though this is called TwinFlow"),
        (lambda t: {**t, "model.diffusion_model.control.weight": torch.ones(2)}, r"unknown control\.weight"),
        (shorten("cap_embedder.1.bias"), "has shape"),
        (shorten("layers.0.attention.qkv.weight"), "do not split in 3"),
        (lambda t: {k: v.double() for k, v in t.items()}, "stored as F64; expected one of"),
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
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
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

    monkeypatch.setattr(conversion, "write_shards", full)
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
    assert "t_embedder_2 is missing, though this is called TwinFlow" in out.err
