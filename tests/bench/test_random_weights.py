"""Models without files: published sizes, weights that every reader sees alike, the real compile path."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from twinflow_rt import bench, load
from twinflow_rt.bench import random_file
from twinflow_rt.bench.random_weights import BLUEPRINTS, skeleton, temporary
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.errors import CheckpointError, ConfigError

# billions of parameters: of the network, with TwinFlow's second time embedder if there is one, and of prompt encoders
PUBLISHED = {
    "z-image": (6.155, 3.92), "qwen-image": (20.44, 7.07), "sd3.5-m": (2.478, 5.58), "sana": (1.640, 2.61),
    "sana-sprint": (1.610, 2.61), "flux2-klein": (3.876, 3.92),
}  # fmt: skip


def billions(folder, part):
    files = folder.glob(f"{part}*/{random_file.FILE}")
    return sum(math.prod(s) for f in files for s in json.loads(f.read_text())["tensors"].values()) / 1e9


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_full_size_is_the_published_one(name):
    with temporary(name) as folder:
        found = billions(folder, "transformer"), billions(folder, "text_encoder")
        assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 2e6
    assert found == pytest.approx(PUBLISHED[name], rel=3e-3)
    assert not folder.exists()


def test_names_and_shapes_are_diffusers(tmp_path):
    """What is declared for Z-Image and its VAE are the keys of diffusers' classes, and TwinFlow's embedder."""
    from diffusers import AutoencoderKL, ZImageTransformer2DModel

    folder = skeleton("z-image", tmp_path / "m", scale=0.05, layers=1)
    for part, cls, other in (
        ("transformer", ZImageTransformer2DModel, "t_embedder_2."), ("vae", AutoencoderKL, "none"),
    ):  # fmt: skip
        checkpoint = Checkpoint(folder / part)
        with torch.device("meta"):
            theirs = cls.from_config(checkpoint.config).state_dict()
        ours = {k: checkpoint.shape(k) for k in checkpoint if not k.startswith(other)}
        assert ours == {k: tuple(v.shape) for k, v in theirs.items() if not k.startswith("encoder.")}


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_measured_by_the_same_path(name):
    """Small, a published model runs the whole bench on a CPU, its outputs correct."""
    record = bench.run(
        random_weights=name, scale=0.02, layers=1, size=(32, 32), device="cpu", dtype="float32", peers=("eager",),
        repeats=3, warmup=0, cold_runs=0, batches=(), evaluations=(),
    )  # fmt: skip
    assert record["settings"]["model"] == f"random-{name}"
    assert record["correctness"]["passed"], record["correctness"]
    assert record["peers"][0]["speedup"] is not None


def test_a_tensor_is_its_names_and_the_seeds():
    one = random_file.random_tensor("a.weight", (7, 5), torch.float32)
    assert torch.equal(one, random_file.random_tensor("a.weight", (7, 5), torch.float32))
    assert not torch.equal(one, random_file.random_tensor("b.weight", (7, 5), torch.float32))
    assert not torch.equal(one, random_file.random_tensor("a.weight", (7, 5), torch.float32, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_have_a_trained_networks_size(dtype):
    matrix = random_file.random_tensor("x.weight", (1500, 1000), dtype).float()
    assert matrix.std() == pytest.approx(1000**-0.5, rel=0.01) and matrix.mean().abs() < 1e-3
    assert len({row.tobytes() for row in matrix.numpy()}) == 1500  # longer than the block, yet no row repeats
    norm = random_file.random_tensor("norm1.weight", (999,), dtype).float()
    assert norm.mean() == pytest.approx(1, abs=0.05) and norm.std() == pytest.approx(0.2, rel=0.1)
    assert random_file.random_tensor("norm1.bias", (999,), dtype).float().std() == pytest.approx(0.1, rel=0.1)


def test_impossible_models():
    for options, message in (
        ({"name": "dalle"}, "use one of z-image"),
        ({"name": "sana", "scale": 0.0}, "scale"),
        ({"name": "sana", "layers": 0}, "layers"),
    ):
        with pytest.raises(ConfigError, match=message), temporary(**options):
            pass


def test_absent_families_are_refused_by_name(monkeypatch):
    from twinflow_rt.bench import random_weights

    monkeypatch.delitem(random_weights.FAMILIES, "SanaTransformer2DModel")
    with pytest.raises(ConfigError, match="no network of sana"), temporary("sana"):
        pass


def test_damaged_declarations_are_named(tmp_path):
    folder = skeleton("z-image", tmp_path / "m", scale=0.02, layers=1, dtype="float32")
    other, shapeless = '{"dtype": "F8", "seed": 0, "tensors": {}}', '{"dtype": "F32", "seed": 0, "tensors": {"a": "x"}}'
    for content in ("{", "[]", other, shapeless):
        (folder / "transformer" / random_file.FILE).write_text(content)
        with pytest.raises(CheckpointError, match=r"declares no random weights|is not readable JSON|JSON object"):
            load(folder, device="cpu")
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match="vae"):
        load(folder, device="cpu")


def test_ordinary_flow_models_have_a_scheduler_and_no_second_embedder(tmp_path):
    folder = skeleton("z-image", tmp_path / "m", scale=0.03, layers=1, dtype="float32", plain=True)
    pipe = load(folder, device="cpu")
    assert pipe.scheduler is not None and pipe.scheduler.steps == 8
    assert not any(name.startswith("t_embedder_2") for name in pipe.source)
