"""load(FILE, base=FOLDER): networks in files beside a model folder, against the folder that has them inside."""

from __future__ import annotations

import json
import shutil
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import factory, gguf_factory
from tests.bad_input.conftest import edit_json, refused
from tests.single_files.layouts import comfy_z_image, ldm_vae, same, to_file, written
from twinflow_rt import cli
from twinflow_rt.bench import runner
from twinflow_rt.bench.settings import Settings
from twinflow_rt.checkpoint import hub
from twinflow_rt.checkpoint.gguf_file import GGUFFile
from twinflow_rt.cli.bench import repeatable
from twinflow_rt.convert import convert
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.integrations.comfyui import NODE_CLASS_MAPPINGS
from twinflow_rt.loading import load, open_model
from twinflow_rt.options import LoadOptions
from twinflow_rt.single_files.recognition import open_files, recognise

ARGS = {"height": 16, "width": 32, "seed": 0, "output": "np"}
SECOND = "t_embedder_2."
WEIGHTS = (".safetensors", ".gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return factory.make_model(tmp_path_factory.mktemp("z") / "m")


@pytest.fixture(scope="module")
def base(model, tmp_path_factory) -> Path:
    """The model without any weights."""
    ignored = shutil.ignore_patterns(*(f"*{end}" for end in WEIGHTS))
    return shutil.copytree(model, tmp_path_factory.mktemp("b") / "base", ignore=ignored)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, Path]:
    """Its networks as people have them: the network without the second embedder, that, text encoder and VAE."""
    folder, network = tmp_path_factory.mktemp("f"), comfy_z_image(written(model, "transformer"))
    second = {name: tensor for name, tensor in network.items() if SECOND in name}
    text = load_file(model / "text_encoder" / "model.safetensors")
    tensors = {
        "network": {name: tensor for name, tensor in network.items() if name not in second},
        "second": {"extended_weights." + name.rpartition("model.")[2]: x for name, x in second.items()},
        "text": {f"text_encoders.qwen3_4b.transformer.model.{name}": tensor for name, tensor in text.items()},
        "vae": ldm_vae(written(model, "vae")),
    }
    return {name: to_file(folder / f"{name}.safetensors", found) for name, found in tensors.items()}


@pytest.fixture(scope="module")
def all_files(files) -> dict[str, object]:
    network, *others = files.values()
    return {"path": network, "files": others, "device": "cpu"}


def images(pipe) -> np.ndarray:
    return pipe("a red square", **ARGS).images


@pytest.fixture(scope="module")
def expected(model) -> np.ndarray:
    return images(load(model, device="cpu"))


def test_every_network_from_files(all_files, base, files, expected, tmp_path):
    """Image for image the folder's; another schedule, adapters, saving and loading again work as of a folder."""
    pipe = load(base=base, **all_files)
    assert np.array_equal(images(pipe), expected)
    assert f"transformer from {files['network']} + {files['second']}" in pipe.plan.notes
    assert pipe.plan.source == "network.safetensors" and pipe.folder == base
    again = load(pipe.save(tmp_path / "saved"), device="cpu")
    assert np.array_equal(images(again), expected)
    assert json.loads((tmp_path / "saved" / "artifact.json").read_text())["source"] != ""


def test_schedules_and_adapters(all_files, base, model, tmp_path):
    name, generator = "layers.0.feed_forward.w2", torch.Generator().manual_seed(0)
    shape = written(model, "transformer")[f"{name}.weight"].shape
    factors = {f"{name}.lora_A.weight": (4, shape[1]), f"{name}.lora_B.weight": (shape[0], 4)}
    lora = to_file(
        tmp_path / "lora.safetensors",
        {f"transformer.{key}": torch.randn(size, generator=generator) for key, size in factors.items()},
    )
    pipe, whole = load(base=base, **all_files), load(model, device="cpu", nfe=2, loras=[lora])
    pipe.set_loras([lora])
    again = load(base=base, loras=[lora], **all_files)
    for one in (pipe, again):
        assert np.array_equal(one("a red square", nfe=2, **ARGS).images, images(whole))
        assert str(one.plan.loras[0]) == "lora.safetensors x 1"


def test_blocks_stream_from_files(all_files, base, expected):
    how = {"largest": (16, 32, 1), **all_files}
    roomy = load(base=base, memory_budget="1GB", **how)
    weights = roomy.memory.weights
    tight = load(base=base, memory_budget=roomy.memory.peak - weights["network"] // 2, **how)
    assert tight.memory.streamed > 0
    for pipe in (roomy, tight):
        assert np.abs(images(pipe).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("family", [name for name in factory.FAMILIES if name != "z-image"])
def test_every_family(family, tmp_path):
    """Each network in a file of its own, in any order, and only one of them."""
    model = factory.make_model(tmp_path / "m", family)
    want = images(load(model, device="cpu"))
    paths = [Path(shutil.copy(p, tmp_path / f"{p.parent.name}.safetensors")) for p in model.glob("*/*.safetensors")]
    base = shutil.copytree(model, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    assert np.array_equal(images(load(base, files=paths[::-1], device="cpu")), want)
    assert np.array_equal(images(load(model / "vae", base=model, device="cpu")), want)
    if family == "sd3":  # a base without T5 has no use for one
        edit_json(base / "model_index.json", text_encoder_3=[None, None])
        refused(lambda: open_files(base, [tmp_path / "text_encoder_3.safetensors"]), "none of the base's networks")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_of_merged_projections(kind, tmp_path, monkeypatch):
    """Parts of a merged tensor have their rows of its values and 4 bits, and it is read once for all of them."""
    config = {**factory.TRANSFORMER, "_class_name": "ZImageTransformer2DModel", "dim": 192}
    config |= {"n_heads": 8, "n_kv_heads": 8}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text("{}")
    key, blocks = "layers.0.attention.qkv.weight", gguf_factory.blocks(kind, (3 * 192, 192))
    file = GGUFFile(gguf_factory.write(tmp_path / "net.gguf", {key: (blocks, kind)}, architecture="flux"))
    ((network, report),) = recognise([file.path], tmp_path)
    assert report.part == "transformer" and report.missing
    checkpoint, source, calls = network.checkpoint(), network.sources[0], []
    for read in (source.read, source.get_int4):
        counted = wraps(read)(lambda name, own=read: (calls.append(name), own(name))[1])
        monkeypatch.setattr(source, read.__name__, counted)
    names = [f"layers.0.attention.to_{x}.weight" for x in "qkv"]
    dense = torch.cat([checkpoint.get(name, dtype=torch.float32) for name in names])
    assert torch.equal(dense, file.get_tensor(key)) and calls == [key]
    assert sum(map(checkpoint.nbytes, names)) == file.nbytes(key) == blocks.size
    assert {checkpoint.int4_form(name) for name in names} == {file.int4_form(key)}
    if kind != "Q8_0":
        fields = zip(*(checkpoint.get_int4(name) for name in names), strict=True)
        for ours, theirs in zip(fields, file.get_int4(key), strict=True):
            assert theirs is None if ours[0] is None else torch.equal(torch.cat(ours), theirs)
        assert calls == [key, key]


def test_what_is_missing_is_named(model, files, base, tmp_path):
    def opened(*names, at=base):
        return lambda: open_files(at, [files.get(name, name) for name in names])

    second = r"network\.safetensors: t_embedder_2 is missing.*give what has it beside these \(files=, --files\): a file"
    refused(opened("network", at=shutil.copytree(base, tmp_path / "TwinFlow")), second, CheckpointError)
    refused(opened("second"), "transformer lacks all_final_layer", CheckpointError)
    refused(opened("network", "second", "network"), r"network\.safetensors is a second transformer beside", ConfigError)
    refused(lambda: load(files["network"]), "is a single file; say with base=", CheckpointError)
    refused(lambda: load(model / "vae"), "go with base=", CheckpointError)
    refused(lambda: load(files["vae"], base=base), "the download is incomplete", CheckpointError)
    refused(lambda: load(model, base=base), "is a whole model, not weights that go with base=", ConfigError)
    refused(lambda: load(files["vae"], base=files["text"]), "is a single file", CheckpointError)
    refused(lambda: load(tmp_path / "absent.gguf", base=base), "is missing", CheckpointError)
    refused(lambda: load(model, files="one.safetensors"), "files must be a list of paths", ConfigError)
    other = to_file(tmp_path / "other.safetensors", {"double_blocks.0.img_mod.lin.weight": torch.ones(2)})
    refused(opened(other), "belong to none of the base's networks", CheckpointError)
    (base / "vae" / "config.json").rename(tmp_path / "config.json")
    try:
        refused(opened("vae"), "belong to none of the base's networks", CheckpointError)
    finally:
        (tmp_path / "config.json").rename(base / "vae" / "config.json")


def test_a_whole_network_lends_its_embedder(model, files):
    """Of tensors in several files the first has its say; the plain network of another file takes no part."""
    found = open_files(model, [files["network"], model / "transformer"])["transformer"]
    (found,) = found.files
    origins = {at.source.folder for name, at in found.where.items() if not name.startswith(SECOND)}
    assert origins == {files["network"]}
    assert {found.where[f"{SECOND}mlp.0.weight"].source.folder} == {model / "transformer"}


def test_what_is_fetched_of_the_hub(files, model, monkeypatch):
    """First the base's configs, which tell what the file is; then its weights, but for what the file has."""
    asked, places = [], {"hf:/owner/base": model, "hf:/owner/net/vae.safetensors": files["vae"]}

    def folder(path, download, without):
        asked.append((path, download, tuple(without)))
        return places[path]

    monkeypatch.setattr(hub, "folder", folder)
    file, base = map(Path, reversed(places))
    where, found = open_model(file, LoadOptions(base=base, download=True))
    assert where == model and list(found) == ["vae"]
    assert asked == [
        (str(file), True, ()), (str(base), True, hub.NETWORKS), (str(base), True, ("vae",))
    ]  # fmt: skip


def test_conversion_merges_files_of_one_network(model, files, base, tmp_path):
    done = convert(list(files.values()), base, tmp_path / "out")
    assert done.parts[0].file == f"{files['network']} + {files['second']}"
    assert sorted(part.part for part in done.parts) == ["text_encoder", "transformer", "vae"]
    same(written(tmp_path / "out", "transformer"), written(model, "transformer"))


def test_commands_and_nodes(files, base, model, expected, tmp_path, capsys):
    network, *others = (str(file) for file in files.values())
    beside = ["--base", str(base), "--files", *others]
    target = tmp_path / "a.png"
    argv = ["generate", "a red square", "--model", network, "-o", str(target), "--size", "32x16", "--seed", "0"]
    assert cli.main([*argv, "--device", "cpu", *beside]) == 0
    assert target.is_file()
    assert cli.main(["encode", "a red square", "--model", network, "-o", str(tmp_path / "e"), *beside]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", network, "--json", *beside]) == 0
    inside = cli.main(["inspect", str(model), "--json"])
    theirs, ours = (json.loads(text) for text in reversed(capsys.readouterr().out.replace("}\n{", "}\0{").split("\0")))
    assert inside == 0 and ours.pop("path").startswith(f"{base}, transformer from {network}")
    assert theirs.pop("path") == str(model) and {**ours, "parts": 0} == {**theirs, "parts": 0}
    bench = cli.build_parser(["bench"]).parse_args(["bench", network, *beside])
    assert repeatable(bench).startswith("twinflow-rt bench network.safetensors --base base --files second.safetensors")
    settings = Settings(network, **{name: getattr(bench, name) for name in ("base", "files")})
    assert list(runner._Run(settings, network, print).opened[1]) == ["transformer", "text_encoder", "vae"]
    node = NODE_CLASS_MAPPINGS["TwinFlowLoad"]()
    (pipe,) = node.load(network, base=str(base), files="\n".join([*others, ""]), device="cpu")
    assert np.array_equal(images(pipe), expected)
