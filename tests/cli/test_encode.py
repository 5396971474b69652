"""Prompts encoded into a file, and generating from it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import factory, sd3_factory
from twinflow_rt.cli import main
from twinflow_rt.cli.encode import encode, open_text
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.loading import LoadOptions, load
from twinflow_rt.stages.embeds_file import fingerprint, read

PROMPTS = ["a red circle", "two blue squares, one above the other", ""]
SIZE = ["--size", "16", "--seed", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return factory.make_model(tmp_path_factory.mktemp("encode") / "m")


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "p.safetensors"
    lines = path.with_suffix(".jsonl")  # a .txt cannot say the empty prompt
    lines.write_text("\n".join(map(json.dumps, PROMPTS[1:])))
    args = ["--model", str(model), "--device", "cpu", "--file", str(lines), "-o", str(path)]
    assert main(["encode", PROMPTS[0], *args]) == 0
    return path


def test_the_file_holds_what_the_text_stage_makes(model, file, capsys):
    pipe, tensors = load(model, device="cpu"), load_file(file)
    with torch.inference_mode():
        expected = pipe.text(PROMPTS)
    assert tensors["lengths"].dtype == torch.int64 and tuple(tensors["lengths"].tolist()) == expected.lengths
    assert (tensors["prompt_embeds"] - expected.embeds).abs().max() < 1e-5
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    assert facts["model"] == str(model) and facts["family"] == "z-image" and json.loads(facts["prompts"]) == PROMPTS
    assert facts["text_encoder"] == fingerprint(pipe.text)


def test_prompts_that_are_cut_are_told(model, tmp_path, capsys):
    path, long = tmp_path / "p.safetensors", "word " * 200 + "the end"
    args = ["--model", str(model), "--device", "cpu", "-o"]
    assert main(["encode", "a", long, "--json", *args, str(path)]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["truncated"] == [False, True]
    assert "\ntwinflow-rt: warning: the prompt 'word " in out.err and "the end'" in out.err
    assert read(path).embeds.truncated == (False, True)
    assert main(["generate", "--prompt-embeds", str(path), *SIZE, "--json", *args, str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["truncated"] == [False, True] and "warning" not in out.err
    assert main(["generate", long, *SIZE, *args, str(tmp_path / "b.png")]) == 0
    assert capsys.readouterr().err.count("twinflow-rt: warning: the prompt") == 1


def test_images_are_those_of_the_prompts(model, file, tmp_path):
    pipe = load(model, device="cpu")
    args = {"height": 16, "width": 16, "seed": 3, "output": "latent", "num_images": 2}
    ours, expected = pipe(pipe.read_embeds(file), **args).images, pipe(PROMPTS, **args).images
    assert (ours - expected).abs().max() < 1e-5
    command = ["generate", "--model", str(model), "--prompt-embeds", str(file), *SIZE]
    assert main([*command, "-o", str(tmp_path / "a.png")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-0.png", "a-1.png", "a-2.png", "a-grid.png"]
    from PIL import Image

    assert json.loads(Image.open(tmp_path / "a-1.png").info["twinflow_rt"])["prompt"] == PROMPTS[1]


def test_pooled_embeddings_are_kept(tmp_path):
    folder = sd3_factory.make_model(tmp_path / "m")
    options = ["--model", str(folder), "--device", "cpu", "-o", str(tmp_path / "p.safetensors")]
    assert main(["encode", *PROMPTS, *options]) == 0
    pipe = load(folder, device="cpu")
    args = {"height": 16, "width": 16, "seed": 3, "output": "latent"}
    ours = pipe(pipe.read_embeds(tmp_path / "p.safetensors"), **args).images
    assert (ours - pipe(PROMPTS, **args).images).abs().max() < 1e-5


def test_many_prompts_go_in_batches(model):
    _, text = open_text(model, LoadOptions(device="cpu"))
    prompts = [f"{'x' * (k % 7)} {k}" for k in range(35)]
    out = encode(text, prompts)
    with torch.inference_mode():
        for k in (0, 16, 34):
            alone = text([prompts[k]])
            assert out.lengths[k] == alone.lengths[0]
            assert (out.embeds[k, : out.lengths[k]] - alone.embeds[0]).abs().max() < 1e-5


def test_a_saved_program_takes_its_models_embeddings(model, file, tmp_path):
    load(model, device="cpu").save(tmp_path / "saved")
    load(tmp_path / "saved", device="cpu").read_embeds(file)


def test_those_of_another_model_are_refused(file, tmp_path):
    other = factory.make_model(tmp_path / "other", head=True)
    weights = other / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.input_layernorm.weight"] += 1e-3  # the same shapes, slightly other weights
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="made by another text encoder"):
        load(other, device="cpu").read_embeds(file)
    sd3 = load(sd3_factory.make_model(tmp_path / "sd3"), device="cpu")
    with pytest.raises(ConfigError, match=r"for z-image, not for sd3\.5"):
        sd3.read_embeds(file)


def rewritten(file, path, change, facts=()):
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() | dict(facts)
    change(tensors)
    save_file(tensors, path, metadata={k: v for k, v in metadata.items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("change", "facts", "message"),
    [
        (lambda t: None, {"format": "x"}, "holds no prompt embeddings"),
        (lambda t: None, {"version": "2"}, "2, newer"),
        (lambda t: None, {"family": None}, "'family'"),
        (lambda t: None, {"prompts": "["}, "no whole file"),
        (lambda t: None, {"truncated": "3"}, "list of booleans"),
        (lambda t: None, {"prompts": '["a"]'}, "1 texts for 3 prompts"),
        (lambda t: t.pop("lengths"), {}, "lacks lengths"),
        (lambda t: t.pop("prompt_embeds"), {}, "lacks prompt_embeds"),
        (lambda t: t.update(stranger=torch.ones(1)), {}, "unknown stranger"),
        (lambda t: t.update(lengths=t["lengths"].float()), {}, "dtypes"),
        (lambda t: t.update(lengths=t["lengths"][None]), {}, "2 axes"),
    ],
)
def test_damaged_files_are_refused(file, tmp_path, change, facts, message):
    with pytest.raises(CheckpointError, match=message):
        read(rewritten(file, tmp_path / "p.safetensors", change, facts))


def test_lengths_beyond_the_rows_are_refused(model, file, tmp_path):
    path = rewritten(file, tmp_path / "p.safetensors", lambda t: t["lengths"].fill_(999))
    pipe = load(model, device="cpu")
    with pytest.raises(ConfigError, match="lengths must be"):
        pipe(pipe.read_embeds(path), height=16, width=16)


@pytest.mark.parametrize("args", [[], ["a prompt", "--prompt-embeds", "x.safetensors"]])
def test_prompts_or_embeddings(args, capsys):
    assert main(["generate", *args, *SIZE]) == 2
    assert "and not both" in capsys.readouterr().err
