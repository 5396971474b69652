"""Checkpoints without TwinFlow's second embedder, sampled by their own scheduler: against diffusers' pipelines."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import WEIGHTS
from tests.networks import relative
from tests.pipelines.plain_models import FLOW, PUBLISHED, SHIFTS, SOLVER, peer_of, schedule_by, theirs
from tests.pipelines.references import MODELS, PROMPTS
from twinflow_rt import cli
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.loading import load
from twinflow_rt.planning.description import describe
from twinflow_rt.sampling.schedule import SamplerConfig, schedule

OTHERS = {
    "qwen-image": [SHIFTS | {"shift_terminal": 0.02}, SHIFTS | {"time_shift_type": "linear"}],
    "sd3-without-t5": [SHIFTS, FLOW], "sana": [FLOW | {"shift": 3.0}],
    "z-image": [SHIFTS | {"shift_terminal": 0.1, "shift": 6.0}, FLOW | {"stochastic_sampling": True, "shift": 2.0}],
}  # fmt: skip
DEFAULTS = {"z-image": 8, "qwen-image": 50, "sd3-without-t5": 28, "sana": 20, "sana-sprint": 2}


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_diffusers_pipeline(plain_pipes, name, steps, monkeypatch):
    ours, peer = plain_pipes(name)
    sizes = MODELS[name].sizes
    size, seeds = sizes[-1] if steps % 8 else sizes[0], [3, 4, 5]
    made = ours(PROMPTS, height=size[0], width=size[1], seed=seeds, nfe=steps, output="latent").images
    assert relative(made, theirs(name, peer, seeds, size, steps, monkeypatch)) < 1e-5
    assert len(ours.program.schedule) == steps


@pytest.mark.parametrize(("name", "settings"), [(name, other) for name in OTHERS for other in OTHERS[name]])
def test_other_settings_of_schedulers_equal_diffusers(plain_folder, tmp_path, name, settings, monkeypatch):
    copied, size = shutil.copytree(plain_folder(name), tmp_path / "m"), MODELS[name].sizes[-1]
    schedule_by(copied, settings)
    made = load(copied, device="cpu", nfe=5)(PROMPTS[:2], height=size[0], width=size[1], seed=[1, 2], output="latent")
    assert relative(made.images, theirs(name, peer_of(name, copied), [1, 2], size, 5, monkeypatch)) < 1e-5


@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_are_the_published_ones_unless_asked_otherwise(plain_folder, plain_pipes, name):
    ours, _ = plain_pipes(name)
    assert len(schedule(ours.sampler, ours.dtype)) == DEFAULTS[name]
    assert "sampled by " + PUBLISHED[name]["_class_name"] in str(ours.plan)
    three = load(plain_folder(name), device="cpu", nfe=3)
    three("x", height=16, width=32, output="latent")
    assert len(three.program.schedule) == 3
    config = SamplerConfig(times=(0.9, 0.3), mode="multi")
    own = load(plain_folder(name), device="cpu", sampler=config)
    own("x", height=16, width=32, output="latent")
    assert own.program.schedule == ((0.9, 0.9), (0.3, 0.3))
    own("x", height=16, width=32, nfe=3, output="latent")
    assert own.program.schedule == three.program.schedule


def test_every_size_has_times_of_its_own(plain_pipes):
    ours, _ = plain_pipes("qwen-image")
    seen = []
    for size in ((16, 16), (64, 64), (16, 16)):
        ours("x", height=size[0], width=size[1], nfe=4, output="latent")
        seen.append(ours.program.schedule)
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize("name", ["z-image", "qwen-image", "sd3-without-t5", "sana-sprint"])
def test_an_artifact_is_sampled_as_it_was_saved(plain_folder, tmp_path, name):
    ours = load(plain_folder(name), device="cpu", nfe=2)
    args = {"height": 16, "width": 32, "seed": 3, "output": "latent"}
    saved = load(ours.save(tmp_path / "TwinFlow-artifact"), device="cpu")
    size = ours.sizes.resolve(None, None)
    assert saved.sampler == ours.sampler and saved.scheduler == ours.scheduler
    assert saved.sampler_of(2, None, size) == ours.sampler
    if name != "qwen-image":  # of another size, and so of other times
        assert torch.equal(saved("x", **args).images, ours("x", **args).images)
        return
    with pytest.raises(ConfigError, match="this artifact is folded for"):
        saved("x", **args)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "sana-sprint"])
def test_target_times_need_the_second_embedder(plain_pipes, name):
    ours, _ = plain_pipes(name)
    for sampler in ("1", "any", SamplerConfig(2)):
        with pytest.raises(ConfigError, match="no second time embedder"):
            ours("x", height=16, width=32, sampler=sampler)
    ours("x", height=16, width=32, sampler=SamplerConfig(2, mode="multi"), output="latent")


@pytest.mark.parametrize("nfe", [0, 101, 10_000, -1, 2.5])
def test_steps_that_cannot_be(plain_pipes, plain_folder, nfe):
    with pytest.raises(ConfigError, match="nfe"):
        plain_pipes("z-image")[0]("x", nfe=nfe)
    with pytest.raises(ConfigError, match="nfe"):
        load(plain_folder("z-image"), device="cpu", nfe=nfe)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "sana-sprint"])
@pytest.mark.parametrize("where", ["folder", "scheduler", "config", "key", "cache"])
def test_what_is_called_twinflow_needs_its_embedder(plain_folder, tmp_path, name, where):
    at = {"folder": tmp_path / "My-TwinFlow", "cache": tmp_path / "models--x--TwinFlow-Y" / "snapshots" / "1"}
    copied = shutil.copytree(plain_folder(name), at.get(where, tmp_path / "m"))
    if where == "scheduler":
        schedule_by(copied, PUBLISHED[name] | {"_name_or_path": "a/twinflow-model"})
    if where == "config":
        path = copied / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "a/TwinFlow-model"}))
    if where == "key":  # one half of the embedder
        file = copied / "transformer" / WEIGHTS
        stored, first = load_file(file), MODELS[name].second.removesuffix("_2.") + "."
        key = next(k for k in sorted(stored) if k.startswith(first))
        half = {key.replace(first, MODELS[name].second, 1): stored[key].clone()}
        save_file(stored | half, file, metadata={"format": "pt"})
    for use in (describe, lambda f: load(f, device="cpu")):
        with pytest.raises(CheckpointError, match=r"is missing, though this is called TwinFlow|missing"):
            use(copied)
    if where == "folder":
        path = copied / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"twinflow": False}))
        load(copied, device="cpu")


@pytest.mark.parametrize(
    ("name", "settings", "error", "match"),
    [
        ("z-image", {"_class_name": "DDIMScheduler"}, ConfigError, "DDIMScheduler.*FlowMatchEulerDiscreteScheduler"),
        ("z-image", {"shift": 3.0}, ConfigError, "_class_name None"),
        ("z-image", PUBLISHED["sana-sprint"], ConfigError, "SCMScheduler goes with SANA-Sprint"),
        ("sana-sprint", FLOW, ConfigError, "SCMScheduler goes with SANA-Sprint"),
        ("sana", {k: v for k, v in SOLVER.items() if k != "use_flow_sigmas"}, ConfigError, "use_flow_sigmas is None"),
        ("sana", SOLVER | {"algorithm_type": "sde-dpmsolver++"}, ConfigError, "algorithm_type"),
        ("z-image", FLOW | {"use_beta_sigmas": True}, ConfigError, "use_beta_sigmas is True"),
        ("z-image", FLOW | {"shift": "3"}, ConfigError, "shift must be a finite number"),
        ("z-image", FLOW | {"shift": 0}, ConfigError, "shift must be positive"),
        ("z-image", FLOW | {"shift": float("nan")}, ConfigError, "shift must be a finite number"),
        ("qwen-image", SHIFTS | {"max_image_seq_len": 256}, ConfigError, "must differ"),
        ("qwen-image", SHIFTS | {"shift_terminal": 1.0}, ConfigError, "shift_terminal"),
        ("qwen-image", SHIFTS | {"time_shift_type": "cubic"}, ConfigError, "time_shift_type"),
        ("qwen-image", SHIFTS | {"use_dynamic_shifting": 1}, ConfigError, "use_dynamic_shifting"),
    ],
)  # fmt: skip
def test_schedulers_that_cannot_be(plain_folder, tmp_path, name, settings, error, match):
    copied = shutil.copytree(plain_folder(name), tmp_path / "m")
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    for use in (describe, lambda f: load(f, device="cpu")):
        with pytest.raises(error, match=match):
            use(copied)


def test_a_missing_scheduler_is_named(plain_folder, tmp_path):
    copied = shutil.copytree(plain_folder("z-image"), tmp_path / "m")
    shutil.rmtree(copied / "scheduler")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        load(copied, device="cpu")


def test_files_beside_a_base(plain_folder, plain_pipes, tmp_path):
    """A file without the second embedder is the network of an ordinary model, unless it is called TwinFlow."""
    args = {"height": 16, "width": 32, "seed": 3, "nfe": 2, "output": "latent"}
    file = shutil.copy(plain_folder("z-image") / "transformer" / WEIGHTS, tmp_path / "net.safetensors")
    made = load(file, base=plain_folder("z-image"), device="cpu")("x", **args).images
    assert torch.equal(made, plain_pipes("z-image")[0]("x", **args).images)
    named = shutil.copy(file, tmp_path / "TwinFlow-net.safetensors")
    with pytest.raises(CheckpointError, match="t_embedder_2 is missing"):
        load(named, base=plain_folder("z-image"), device="cpu")
    assert cli.main(["convert", str(file), str(tmp_path / "out"), "--base", str(plain_folder("z-image"))]) == 0
    assert torch.equal(load(tmp_path / "out", device="cpu")("x", **args).images, made)
    twin = MODELS["z-image"].make(tmp_path / "twin")
    with pytest.raises(CheckpointError, match="t_embedder_2 is missing"):
        load(file, base=twin, device="cpu")


def test_commands(plain_folder, tmp_path, capsys):
    model = str(plain_folder("z-image"))
    assert cli.main(["inspect", model]) == 0
    assert "sampled by FlowMatchEulerDiscreteScheduler" in capsys.readouterr().out
    out = tmp_path / "a.png"
    command = ["generate", "x", "--model", model, "--device", "cpu", "-o", str(out)]
    assert cli.main([*command, "--nfe", "3", "--size", "16"]) == 0
    assert out.exists() and "3 evaluation(s)" in capsys.readouterr().err
    assert cli.main([*command, "--mode", "any"]) != 0
    assert "no second time embedder" in capsys.readouterr().err


def test_a_server_samples_by_the_scheduler(plain_pipes):
    from twinflow_rt.serve.engine import Engine

    ours, _ = plain_pipes("qwen-image")
    engine = Engine(ours)
    (job,) = engine.submit("x", width=32, height=16, seed=1, nfe=3)
    assert job.future.result().size == (32, 16)
    assert job.kind[2] == ours.sampler_of(3, None, (16, 32)) and engine.drain()
