"""The command line: files, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.factory import make_model
from twinflow_rt import cli
from twinflow_rt.checkpoint import image_files
from twinflow_rt.cli import options
from twinflow_rt.errors import ConfigError
from twinflow_rt.loading import load
from twinflow_rt.pipeline import Pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("cli") / "m"))


@pytest.fixture
def generate(model, tmp_path, capsys):
    def run(*args, out="out.png", prompts=("a red square",)):
        argv = ["generate", *prompts, "--model", model, "--device", "cpu", "-o", str(tmp_path / out), *args]
        code = cli.main([str(a) for a in argv])
        return code, capsys.readouterr()

    return run


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_one_image(generate, model, tmp_path):
    code, out = generate("--seed", 5, "--size", "24x16")
    assert code == 0 and "(seed 5)" in out.out and "float32, on cpu: load" in out.out
    steps = [f"loading {model}", f"{model}: z-image, float32, on cpu, 1 evaluation(s)", "making 1 image"]
    assert out.err.splitlines()[:3] == steps and out.err.isprintable() is False and "\x1b" not in out.err
    expected = load(model, device="cpu")("a red square", width=24, height=16, seed=5, output="np").images[0]
    assert np.array_equal(pixels(tmp_path / "out.png"), expected)
    assert os.listdir(tmp_path) == ["out.png"]


def test_pictures(generate, model, tmp_path):
    """One picture for each prompt, in calls of one image; bad ones are refused before the model is loaded."""
    pictures = [np.full((16, 24, 3), value, np.uint8) for value in (40, 200)]
    files = [tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "mask.png"]
    for file, image in zip(files, (*pictures, np.tile(np.arange(24) < 9, (16, 1))), strict=True):
        Image.fromarray(image).save(file)
    given = ("--image", files[0], "--image", files[1], "--mask", files[2], "--strength", 0.7)
    code, _ = generate(*given, "--seed", 5, "--batch-size", 1, "--num-images", 2, prompts=("a", "b"))
    pipe = load(model, device="cpu")
    expected = pipe(
        ["a", "b"], image=files[:2], mask=files[2], strength=0.7, seed=5, num_images=2, output="np"
    ).images  # fmt: skip
    assert code == 0
    for k, want in enumerate(expected):
        assert np.abs(pixels(tmp_path / f"out-{k}.png").astype(int) - want).max() <= 1
    with Image.open(tmp_path / "out-0.png") as image:
        facts = json.loads(image.text["twinflow_rt"])
    assert facts["strength"] == 0.7 and facts["image"] == [str(files[0]), str(files[1])]
    for wrong, message in (
        (("--image", tmp_path / "none.png"), "cannot be read"), (("--strength", 0.5), "strength= goes with image="),
        (("--image", files[0], "--strength", "nan"), "strength must be"), (given[:4] + given[:2], "for all prompts"),
    ):  # fmt: skip
        code, out = generate(*wrong, prompts=("a", "b"))
        assert code == 2 and message in out.err and "loading" not in out.err


def test_png_says_how_it_was_made(generate, tmp_path):
    generate("--seed", 5, "--size", 16, prompts=("ein rotes Quadrat ✓",))
    with Image.open(tmp_path / "out.png") as image:
        facts = json.loads(image.text["twinflow_rt"])
    assert (facts["prompt"], facts["seed"], facts["nfe"]) == ("ein rotes Quadrat ✓", 5, 1)


def test_loras_are_merged_and_written_down(generate, model, tmp_path):
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    name, paths = "transformer.layers.0.attention.to_k", [tmp_path / "a.safetensors", tmp_path / "b:2.safetensors"]
    for path in paths:
        save_file({f"{name}.lora_A.weight": torch.randn(2, 48), f"{name}.lora_B.weight": torch.randn(48, 2)}, path)
    code, _ = generate("--seed", 5, "--size", 16, "--lora", f"{paths[0]}:-0.5", "--lora", paths[1])
    expected = load(model, device="cpu", loras={paths[0]: -0.5, paths[1]: 1})
    images = expected("a red square", width=16, height=16, seed=5, output="np").images
    assert code == 0 and np.array_equal(pixels(tmp_path / "out.png"), images[0])
    with Image.open(tmp_path / "out.png") as image:
        assert json.loads(image.text["twinflow_rt"])["loras"] == ["a.safetensors x -0.5", "b:2.safetensors x 1"]
    code, out = generate("--lora", tmp_path / "none.safetensors")
    assert code == 2 and "none.safetensors does not exist" in out.err


def test_many_images_with_grid_and_json(generate, tmp_path):
    code, out = generate(
        "--seed", 1, "--size", 16, "--num-images", 3, "--nfe", 2, "--json", out="a.b.jpg", prompts=("a", "b")
    )
    report = json.loads(out.out)
    names = [*(f"a.b-{i}.jpg" for i in range(6)), "a.b-grid.jpg"]
    assert code == 0 and report["files"] == [str(tmp_path / n) for n in names]
    assert report["seeds"] == [1, 2, 3, 4, 5, 6] and report["size"] == [16, 16]
    assert report["seconds"]["total"] > 0 and report["peak_bytes"]["decode"] > 0
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert pixels(tmp_path / names[-1]).shape == (32, 48, 3)  # one row per prompt


@pytest.mark.parametrize(
    ("args", "nfe"), [([], 1), (["--nfe", "3"], 3), (["--mode", "any"], 4), (["--nfe", "2", "--mode", "multi"], 2)]
)
def test_nfe_and_mode_choose_the_schedule(generate, tmp_path, args, nfe):
    assert generate("--size", 16, *args)[0] == 0
    with Image.open(tmp_path / "out.png") as image:
        assert json.loads(image.text["twinflow_rt"])["nfe"] == nfe


def test_a_saved_program_keeps_its_schedule(model, tmp_path, capsys):
    load(model, device="cpu", nfe=2).save(tmp_path / "saved")
    argv = ["generate", "x", "--model", str(tmp_path / "saved"), "--device", "cpu", "--size", "16"]
    assert cli.main([*argv, "-o", str(tmp_path / "o.png")]) == 0
    assert cli.main([*argv, "-o", str(tmp_path / "p.png"), "--nfe", "1"]) == 2
    assert "folded for 2 evaluation(s)" in capsys.readouterr().err


def test_grid_places_images_row_by_row():
    images = [Image.new("RGB", (2, 1), (i, 0, 0)) for i in range(5)]
    sheet = np.asarray(image_files.grid(images))[:, ::2, 0]
    assert sheet.tolist() == [[0, 1, 2], [3, 4, 255]]
    assert np.asarray(image_files.grid(images[:4], 1)).shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "65"], "the nearest is 64"),
        (["--nfe", "0"], "nfe"),
        (["--num-images", "0"], "num_images"),
        (["--seed", "-1"], "seed"),
        (["--dtype", "int4"], "dtype 'int4'"),
        (["--device", "cuda:99"], "absent"),
        (["--model", "nowhere"], "does not exist"),
        (["-o", "x.gif"], "must end in one of .png"),
        (["-o", "no/such/x.png"], "does not exist; create it first"),
    ],
)
def test_errors_are_one_line_and_exit_2(generate, tmp_path, args, message):
    code, out = generate(*args)
    assert code == 2 and out.out == ""
    assert message in out.err.splitlines()[-1] and out.err.count("twinflow-rt: ") == 1 and "Traceback" not in out.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("args", [["--size", "axb"], ["--size", "64x"], ["--size", "x64"], ["--mode", "fast"]])
def test_unparsable_options_exit_2(generate, args):
    if args[1] == "64x":  # a missing height means square
        assert options.parse_size("64x") == (64, 64)
        return
    with pytest.raises(SystemExit) as caught:
        generate(*args)
    assert caught.value.code == 2


def test_a_full_disk_leaves_no_file_and_no_traceback(generate, tmp_path, monkeypatch):
    (tmp_path / "out.png").write_bytes(b"before")

    def full(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, out = generate("--size", 16)
    assert code == 2 and "No space left" in out.err and "Traceback" not in out.err
    assert os.listdir(tmp_path) == ["out.png"] and (tmp_path / "out.png").read_bytes() == b"before"


def test_images_are_written_as_they_are_done(generate, model, tmp_path, monkeypatch):
    """Calls of at most --batch-size images, each written before the next begins, and equal to one call's."""
    there = []
    real = Pipeline.__call__

    def call(self, *args, **kwargs):
        there.append(sorted(os.listdir(tmp_path)))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Pipeline, "__call__", call)
    how = ("--seed", 3, "--size", 16, "--nfe", 2)
    code, out = generate(*how, "--num-images", 3, "--batch-size", 2, prompts=("a", "b"))
    assert code == 0 and [len(files) for files in there] == [0, 2, 3, 5]
    assert out.err.count("evaluation 2 of 2") == 4 and "making 6 images: 6 of 6" in out.err
    assert [f"out-{k}.png (seed {3 + k})" in out.out for k in range(6)] == [True] * 6
    monkeypatch.undo()
    expected = load(model, device="cpu")(["a", "b"], width=16, height=16, seed=3, num_images=3, nfe=2, output="np")
    made = np.stack([pixels(tmp_path / f"out-{k}.png") for k in range(6)]).astype(int)
    assert np.abs(made - expected.images).max() <= 1


def test_what_auto_chose_is_printed(generate):
    code, out = generate("--size", 16, "--precision", "auto")
    assert code == 0 and "float32 (chosen by auto), on cpu" in out.err and ": auto chose float32" in out.err
    assert "float32 (chosen by auto), on cpu: load" in out.out


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError, ConfigError])
def test_ctrl_c_is_no_traceback_whatever_a_library_makes_of_it(generate, monkeypatch, error):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests in the background may ignore it

    def stop(*args, **kwargs):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # a second one ends the process
            raise error("unknown failure") from None

    monkeypatch.setattr("twinflow_rt.loading.load_opened", stop)
    code, out = generate()
    assert code == 130 and out.err.endswith("twinflow-rt: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_exits_130(generate, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("twinflow_rt.loading.load_opened", stop)
    assert generate()[0] == 130


def test_inspect(model, capsys):
    assert cli.main(["inspect", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    parts = {p["name"]: p for p in facts["parts"]}
    pipe = load(model, device="cpu")
    networks = {"text_encoder": pipe.text.network, "transformer": pipe.program.network, "vae": pipe.vae.network}
    for name, network in networks.items():
        assert parts[name]["needed"] == sum(p.numel() for p in network.parameters())
        assert parts[name]["dtype"] == "float32" and parts[name]["stored"] * 4 == parts[name]["stored_bytes"]
    resident = sum(t.nbytes for n in networks.values() for t in (*n.parameters(), *n.buffers()))
    assert facts["memory"]["float32"] == resident
    folded = sum(facts["folded"].values())
    assert folded == parts["transformer"]["stored"] - parts["transformer"]["needed"]
    assert facts["folded_share"] == pytest.approx(folded / parts["transformer"]["stored"])
    assert cli.main(["inspect", model]) == 0
    text = capsys.readouterr().out
    assert "z-image" in text and "t_embedder" in text and f"{facts['folded_share']:.1%}" in text


def test_inspect_counts_what_the_plan_counts(model, capsys, tmp_path):
    """Work and least times per stage, for a size, a prompt and a machine that was measured."""
    record = json.loads((Path(__file__).parents[2] / "benches" / "records" / "demo-cpu.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps(record))
    asked = ["inspect", model, "--ceilings", str(tmp_path / "r.json")]
    assert cli.main([*asked, "--json"]) == 0
    facts, plan = json.loads(capsys.readouterr().out), load(model, device="cpu").plan
    assert (facts["size"], facts["tokens"], facts["dtype"]) == ([64, 64], 32, "float32")
    for ours, theirs in zip(facts["stages"], plan.stages, strict=True):
        assert (ours["name"], ours["flops"]) == (theirs.name, theirs.flops)
        assert ours["activation_bytes"] == theirs.activation_bytes > 0
        assert ours["weight_bytes"] == theirs.weight_bytes
        gemm, copy = record["ceilings"]["gemm"]["float32"], record["ceilings"]["copy"]
        floor = max(ours["flops"] / gemm, (ours["weight_bytes"] + ours["activation_bytes"]) / copy)
        assert facts["floors"][ours["name"]]["measured"] == pytest.approx(floor)
        assert facts["floors"][ours["name"]]["h200"] > 0
    assert cli.main(["inspect", model, "--size", "128x64", "--tokens", "64", "--dtype", "bfloat16", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    (text, *_, decode), (text_before, *_, before) = other["stages"], facts["stages"]
    assert other["size"] == [64, 128] and decode["flops"] > 1.9 * before["flops"]
    assert text["flops"] > 1.9 * text_before["flops"] and 2 * decode["weight_bytes"] == before["weight_bytes"]
    assert cli.main(asked) == 0
    text = capsys.readouterr().out
    assert "work of one 64x64 image from 32 prompt tokens at one evaluation, float32" in text and "measured" in text
    for wrong, message in ((["--tokens", "0"], "tokens must be 1 to"), (["--size", "33x32"], "multiple of")):
        assert cli.main(["inspect", model, *wrong]) == 2 and message in capsys.readouterr().err
    assert cli.main([*asked, "--dtype", "bfloat16"]) == 2 and "not bfloat16" in capsys.readouterr().err


def test_inspect_says_what_fits_a_card(model, capsys):
    assert cli.main(["inspect", model, "--cards", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["card"] for row in rows] == ["6 GB", "8 GB", "12 GB", "16 GB", "24 GB"]
    assert all((row["image"], row["precision"], row["network"]) == ("64x64", "bf16", "stays") for row in rows)
    assert cli.main(["inspect", model, "--cards", "--size", "32x64"]) == 0
    assert "| 32x64 | 6 GB | bf16 | stays | stays | whole | 0.0 GB |" in capsys.readouterr().out
    assert cli.main(["inspect"]) == 2 and "inspect needs a model" in capsys.readouterr().err


def test_inspect_refuses_what_load_refuses(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "model_index.json is missing" in capsys.readouterr().err


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_train_demo_options_come_from_the_trainer(tmp_path):
    args = cli.build_parser(["train"]).parse_args(["train", "demo", "--out", str(tmp_path), "--seed", "3"])
    assert (args.command, args.trained, args.out, args.seed) == ("train", "demo", tmp_path, 3)


def test_size_is_width_by_height():
    assert options.parse_size("96x64") == (96, 64) and options.parse_size("32") == (32, 32)
