"""Training: the whole recipe in a few steps, and runs that are killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import load_file

from twinflow_rt.errors import ConfigError
from twinflow_rt.loading import load
from twinflow_rt.training import demo, muon
from twinflow_rt.training.demo import RECIPES, DemoModel, LatentData, Prompts, deepen, train
from twinflow_rt.training.text import Captions, build_tokenizer
from twinflow_rt.training.trainer import Trainer, TrainerConfig

TINY = replace(
    RECIPES["twinflow"], scenes=16, autoencoder_steps=1, text_steps=2, flow_steps=2, flow_batch=4,
    settle_steps=2, settle_batch=4, samples=3, sample_steps=2, warm_steps=2, warm_batch=4, last_steps=2, last_batch=4,
)  # fmt: skip


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("train")
    return out, train(out, TINY, quiet)


def test_the_recipe_ends_in_a_model_that_loads_and_draws(trained):
    pipe = load(trained[1], device="cpu")
    assert pipe("a red circle", seed=0, output="np").images.shape == (1, 64, 64, 3)
    assert pipe.plan.folded["t_embedder_2.mlp"] > 0


def test_the_same_seed_gives_the_same_model_resumed_or_not(trained, tmp_path):
    """The second run stops after its flow stage and is called again, as after an interruption."""
    train(tmp_path, replace(TINY, last_steps=0), quiet)
    (tmp_path / "twinflow.json").unlink()
    again = train(tmp_path, TINY, quiet)
    for part in ("transformer", "text_encoder", "vae"):
        (file,) = (trained[1] / part).glob("*.safetensors")
        a, b = load_file(file), load_file(again / part / file.name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part


def test_a_folder_belongs_to_one_recipe(trained):
    with pytest.raises(ConfigError, match="another recipe"):
        train(trained[0], replace(TINY, seed=1), quiet)


def test_a_deeper_model_starts_as_the_same_function():
    torch.manual_seed(0)
    model = DemoModel(512, 2)
    for name, p in model.network.named_parameters():
        if "adaLN" in name or "all_final_layer" in name:  # zeros at first, under which every network is the same
            nn.init.normal_(p, std=0.1)
    deep = deepen(model, 5)
    x, t, cond = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 1.0]), (torch.randn(2, 32, 96), torch.tensor([32, 5]))
    assert len(deep.network.layers) == 5
    torch.testing.assert_close(deep(x, t, 0.5 * t, cond), model(x, t, 0.5 * t, cond), atol=1e-5, rtol=1e-5)
    deep(x, t, t, cond).square().mean().backward()
    assert deep.network.layers[1].adaLN_modulation[0].weight.grad.abs().max() > 0  # and the copies can learn


def test_products_in_bfloat16_are_those_of_float32_within_its_rounding(monkeypatch):
    x, t, cond = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.9]), (torch.randn(2, 32, 96), torch.tensor([32, 5]))
    velocity = {}
    for native in (True, False):
        monkeypatch.setattr(demo, "has_native", lambda dtype, device, native=native: native)
        torch.manual_seed(0)
        model = DemoModel(512, 2)
        for name, p in model.network.named_parameters():
            if "adaLN" in name or "all_final_layer" in name:
                nn.init.normal_(p, std=0.1)
        velocity[native] = model(x, t, t, cond)
    error = (velocity[True] - velocity[False]).norm() / velocity[False].norm()
    assert 1e-5 < error < 1e-2


def test_matrices_are_orthogonalized_in_either_precision(monkeypatch):
    g = torch.randn(3, 24, 72, generator=torch.Generator().manual_seed(0))
    for native in (True, False):
        monkeypatch.setattr(muon, "has_native", lambda dtype, device, native=native: native)
        for matrix in (g, g.mT):
            made = muon.orthogonalize(matrix)
            assert made.shape == matrix.shape and made.dtype == torch.float32
            values = torch.linalg.svdvals(made)
            assert values.min() > 0.6 and values.max() < 1.3


def test_prompts_are_encoded_once_and_are_the_encoders():
    torch.manual_seed(0)
    tokenizer = build_tokenizer(0)
    model, captions = DemoModel(len(tokenizer), 1), Captions(tokenizer)
    texts = ["a red circle", "two blue squares", "a red circle", "a cross left of a triangle"]
    ids, lengths = captions.tokenize(texts)
    data = LatentData(torch.zeros(4, 4, 16, 16), ids, lengths, captions.tokenize([""]))
    prompts = Prompts(model, data)
    assert len(prompts.embeds) == 4  # three captions and the empty one
    embeds, counts = prompts(torch.tensor([3, 0, 2, -1]))
    for row, text in enumerate([texts[3], texts[0], texts[2], ""]):
        with torch.no_grad():
            expected, (n,) = model.embed(*captions.tokenize([text]))
        assert counts[row] == n
        torch.testing.assert_close(embeds[row, :n], expected[0, :n], atol=1e-5, rtol=1e-5)


def toy(folder, log=quiet) -> Trainer:
    """Three hundred steps on random numbers, saved at every one."""
    torch.manual_seed(0)
    loss = lambda model, ema, step: (model(torch.randn(4, 8)).square().mean(), {})
    return Trainer("toy", nn.Linear(8, 8), loss, TrainerConfig(300, 1e-2, 0.9, seed=1, save_every=1), folder, log)


def test_killed_at_any_moment_it_resumes_bit_for_bit(tmp_path):
    whole = toy(tmp_path / "whole").run().state_dict()
    here = os.path.dirname(__file__)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_demo; from pathlib import Path; "
    code += f"test_demo.toy(Path({str(tmp_path / 'killed')!r}), lambda line: print(line, flush=True)).run()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert "toy 50/300" in process.stdout.readline()
    time.sleep(0.03)  # somewhere inside the next steps or their saving
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = toy(tmp_path / "killed")
    state = resumed.run().state_dict()
    assert all(torch.equal(state[k], whole[k]) for k in whole)
    assert process.returncode == -signal.SIGKILL
