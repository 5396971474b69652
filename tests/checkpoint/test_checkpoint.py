"""Reading checkpoints: every layout gives the same network; everything else is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import WEIGHTS, make_model, shard
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.model_folder import model_folder
from twinflow_rt.checkpoint.reading import materialize
from twinflow_rt.errors import CheckpointError, ConfigError, TwinFlowError
from twinflow_rt.families import family_of
from twinflow_rt.loading import load

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("load") / "m")


@pytest.fixture
def model(source, tmp_path):
    return shutil.copytree(source, tmp_path / "m")


def network(model, dtype=torch.float32):
    checkpoint = Checkpoint(model / "transformer")
    family = family_of(checkpoint.config)
    with torch.device("meta"):
        net = family.network(family.config.from_dict(checkpoint.config))
    return net, materialize(net, checkpoint, family.layout, CPU, dtype)


def edit_weights(model, change, part="transformer"):
    path = model / part / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_shards_and_single_file_give_the_same_network(source, model):
    shard(model / "transformer")
    (whole, report), (sharded, again) = network(source), network(model)
    assert (report.tensors, report.bytes_read) == (again.tensors, again.bytes_read)
    for (name, a), b in zip(whole.state_dict().items(), sharded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not any(p.requires_grad or p.is_meta for p in whole.parameters()) and not whole.training


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_stored_dtype_is_cast_once(source, tmp_path, stored, dtype):
    net, _ = network(make_model(tmp_path / "half", dtype=stored), dtype)
    exact, _ = network(source)
    for name, a in exact.state_dict().items():
        b = net.get_parameter(name)
        assert b.dtype == (torch.float32 if "norm_q" in name or "norm_k" in name or "cap_embedder.0" in name else dtype)
        assert torch.equal(a.to(stored).to(b.dtype), b), name


def test_checkpoint_reads_lazily_and_maps_the_file(source):
    checkpoint = Checkpoint(source / "transformer")
    name = "layers.0.feed_forward.w2.weight"
    assert checkpoint.shape(name) == (48, 128) and checkpoint.dtype(name) == torch.float32
    assert checkpoint.nbytes(name) == 48 * 128 * 4 and name in checkpoint and "no" not in checkpoint
    assert checkpoint.main_dtype() == torch.float32
    assert torch.equal(checkpoint.get(name), load_file(source / "transformer" / WEIGHTS)[name])
    assert checkpoint.get(name, "cpu", torch.bfloat16).dtype == torch.bfloat16
    assert sorted(checkpoint.keys()) == sorted(checkpoint)


def test_progress_counts_every_byte_read(source):
    seen: dict[str, int] = {}

    def progress(part, size):
        seen[part] = seen.get(part, 0) + size

    load(source, device="cpu", progress=progress)
    assert set(seen) == {"text encoder", "transformer", "vae"} and min(seen.values()) > 0


def test_what_inference_does_not_use_is_not_read(source):
    pipe = load(source, device="cpu")
    names = [n for m in (pipe.text.network, pipe.vae.network) for n, _ in m.named_parameters()]
    assert not any("encoder.down_blocks" in n or n.startswith(("layers.3", "norm.", "lm_head")) for n in names)


def weights(**changes):
    """Put tensors into the transformer's file, or with None take them out."""

    def change(tensors):
        tensors |= {name: made(tensors) if callable(made) else made for name, made in changes.items()}
        for name in [name for name, tensor in tensors.items() if tensor is None]:
            del tensors[name]

    return lambda model: edit_weights(model, change)


def remove_second_embedder(model):
    edit_weights(model, lambda t: [t.pop(k) for k in list(t) if k.startswith("t_embedder_2")])
    (model / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "TwinFlowScheduler"}')


def bytes_of(change):
    """Replace the bytes of the transformer's file by change(bytes)."""

    def damage(model):
        path = model / "transformer" / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return damage


def only_pickle(model):
    (model / "transformer" / WEIGHTS).rename(model / "transformer" / "diffusion_pytorch_model.bin")


def index(change):
    """Shard the transformer, and let change(weight_map) be what its index says."""

    def damage(model):
        shard(model / "transformer")
        path = model / "transformer" / (WEIGHTS + ".index.json")
        edit_json(path, lambda content: content.update(weight_map=change(content["weight_map"])))

    return damage


def first_moved(weight_map):
    files = sorted(set(weight_map.values()))
    return {**weight_map, next(k for k, v in weight_map.items() if v == files[0]): files[1]}


def lose_shard(model):
    shard(model / "transformer")
    next((model / "transformer").glob("*00002-of*")).unlink()


def two_variants(model):
    path = model / "transformer" / WEIGHTS
    shutil.copy(path, path.with_name("a.fp16.safetensors"))
    path.rename(path.with_name("b.safetensors"))


def config(part, **changes):
    return lambda model: edit_json(model / part / "config.json", lambda content: content.update(changes))


KEY = "layers.1.attention.to_k.weight"
DAMAGES = [
    (remove_second_embedder, "second time embedder"), (bytes_of(lambda data: data[:-1000]), "truncated"),
    (bytes_of(lambda data: b"\xff" * 64), "truncated or no safetensors"), (only_pickle, "only pickles .*can run code"),
    (index(lambda names: dict.fromkeys(names, "../vae/" + WEIGHTS)), "not a .safetensors file of its own folder"),
    (lose_shard, "00002-of-00003.safetensors is missing"), (index(first_moved), "which lacks it"),
    (index(lambda names: ["a"]), "no weight_map"),
    (two_variants, r"several weight files \(a.fp16.safetensors, b.safetensors\)"),
    (weights(x_pad_token=lambda t: t["x_pad_token"].double()), "stored as F64"),
    (weights(**{KEY: lambda t: t[KEY][:-1].clone()}), r"to_q.* \+ .*to_k.* has shape .*asks for \(144, 48\)"),
    (weights(x_pad_token=None), "missing x_pad_token"), (weights(more=torch.ones(2)), "unknown more"),
    (weights(x_pad_token=torch.ones(1, 4)), r"\(1, 4\).*asks for \(1, 48\)"),
    (lambda m: (m / "transformer" / WEIGHTS).unlink(), "no .safetensors file"),
    (lambda m: shutil.rmtree(m / "vae"), "no vae/ folder"),
    (lambda m: (m / "model_index.json").unlink(), "model_index.json is missing"),
    (lambda m: (m / "model_index.json").write_text("[1]"), "must hold a JSON object"),
    (lambda m: (m / "transformer" / "config.json").write_text("{"), "not readable JSON"),
    (lambda m: (m / "vae" / "config.json").write_bytes(b"\xff\xfe"), "not UTF-8 text"),
    (config("transformer", _class_name="FluxX"), "FluxX"), (config("transformer", axes_dims=[8, 8]), "add up"),
    (config("vae", _class_name="AutoencoderDC"), "AutoencoderDC"),
    (config("vae", latents_mean=[0.0]), "another family"), (config("text_encoder", model_type="t5"), "'t5'"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_what_is_wrong_is_named(model, damage, message):
    damage(model)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load(model, device="cpu")
    assert caught.value.__cause__ is None and "\n" not in str(caught.value)


def test_parts_of_two_models_are_refused(model):
    def widen(tensors):
        for k in ("cap_embedder.0.weight", "cap_embedder.1.weight"):
            tensors[k] = torch.cat((tensors[k], tensors[k]), -1)

    edit_weights(model, widen)
    config("transformer", cap_feat_dim=64)(model)
    with pytest.raises(CheckpointError, match=r"hidden_size 32 does not fit .* cap_feat_dim 64"):
        load(model, device="cpu")


def test_paths_that_are_no_model(tmp_path, source):
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="single file"):
        model_folder(source / "transformer" / WEIGHTS)
    with pytest.raises(TwinFlowError):
        load("")


def test_linked_files_load(source, model):
    """Download caches keep weights elsewhere and link to them."""
    path = model / "transformer" / WEIGHTS
    path.unlink()
    path.symlink_to(source / "transformer" / WEIGHTS)
    assert network(model)[1].tensors == network(source)[1].tensors
