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
from twinflow_rt.training.demo import RECIPES, train
from twinflow_rt.training.trainer import Trainer, TrainerConfig

TINY = replace(
    RECIPES["twinflow"], scenes=16, autoencoder_steps=1, text_steps=2, flow_steps=2, flow_batch=4,
    settle_steps=2, settle_batch=4, last_steps=2, last_batch=4,
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
