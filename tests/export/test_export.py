"""The exported file against the pipeline it was made from, and every way it can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

import twinflow_rt
from tests.bad_input.sweep import sweep
from tests.export.conftest import QUICK, SIZE
from twinflow_rt import CheckpointError, ConfigError, PromptEmbeds
from twinflow_rt.errors import TwinFlowError
from twinflow_rt.export import program
from twinflow_rt.export.archive import MANIFEST, Reader, Writer, storage_elements
from twinflow_rt.export.program import export_model

HEIGHT, WIDTH = SIZE
PROMPTS = ["a red circle", "a blue square above a green triangle, and then some more of it"]


@pytest.fixture(scope="module")
def pipe(small):
    return twinflow_rt.load(small, nfe=2, device="cpu")


@pytest.fixture(scope="module")
def model(exported):
    return twinflow_rt.load_exported(exported)


def off_by(a: torch.Tensor, b: torch.Tensor) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    return int((a.int() - b.int()).abs().max())


def test_manifest_says_what_the_file_holds(exported, model):
    facts = model.manifest
    assert (facts["family"], facts["nfe"], facts["sizes"]) == ("z-image", 2, [[HEIGHT, WIDTH]])
    assert facts["twinflow_rt"] == twinflow_rt.__version__ and facts["torch"] == torch.__version__
    assert facts["prompt"] == {"width": 32, "multiple": 32, "fixed": None, "max_tokens": 544, "extras": []}
    assert facts["noise"]["streams"] == 1 and facts["output"]["layout"] == "NHWC"
    names = {name.split("/", 1)[1] for name in zipfile.ZipFile(exported).namelist()}
    unlisted = {n for n in names - set(facts["files"]) if not n.startswith((".", "archive_", "byteorder", "version"))}
    assert unlisted == {MANIFEST}


@pytest.mark.parametrize("images", [1, 2])
def test_images_equal_the_pipelines(pipe, model, images):
    """Prompts of one and of two padded lengths, any number of images."""
    for prompts in (PROMPTS[:1], PROMPTS):
        embeds = pipe.text(prompts)
        call = {"height": HEIGHT, "width": WIDTH, "seed": 2**40 + 3, "num_images": images}
        wanted = torch.from_numpy(pipe(embeds, output="np", **call).images)
        assert wanted.float().std() > 10  # pictures, not a constant
        assert off_by(model(embeds, **call), wanted) <= 1
    assert off_by(model(embeds, seed=1), model(embeds, seed=2)) > 1


def test_images_do_not_depend_on_what_lies_beyond_a_prompt(pipe, model):
    embeds = pipe.text(PROMPTS)
    dirty = embeds.embeds.clone()
    dirty[0, embeds.lengths[0] :] = 1e3
    longer = torch.cat((dirty, torch.full_like(dirty[:, :7], -1e3)), 1)
    assert torch.equal(model(embeds, seed=0), model(PromptEmbeds(longer, embeds.lengths), seed=0))


def test_text_encoder_equals_the_pipelines(pipe, model):
    ids = pipe.text.tokenizer(PROMPTS, 512)
    ours, theirs = pipe.text(PROMPTS), model.encode(ids)
    assert ours.lengths == theirs.lengths
    for a, b, n in zip(ours.embeds, theirs.embeds, ours.lengths, strict=True):
        assert (a[:n] - b[:n]).norm() <= 1e-5 * a[:n].norm()
    text = model.manifest["text"]
    core = twinflow_rt.load_exported(model.archive.path).archive.text("extra/tokenizer.json")
    from tokenizers import Tokenizer

    written = Tokenizer.from_str(core).encode(text["prefix"] + PROMPTS[0] + text["suffix"])
    assert written.ids == ids[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(embeds=torch.zeros(1, 4, 31)), r"\[B, L, 32\]"),
        (dict(embeds=torch.zeros(4, 32)), "do not fit"),
        (dict(lengths=(5,)), "lengths from 1 to L|do not fit"),
        (dict(lengths=(0,)), "do not fit|rows"),
        (dict(lengths=(1, 2)), "do not fit"),
        (dict(embeds=torch.zeros(1, 600, 32), lengths=(600,)), "1 to 544"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(model, change, message):
    given = {"embeds": torch.zeros(1, 4, 32), "lengths": (4,), **change}
    with pytest.raises(ConfigError, match=message):
        model(PromptEmbeds(**given))


def test_calls_that_cannot_work_are_refused(model):
    prompt = PromptEmbeds(torch.zeros(1, 4, 32), (4,))
    with pytest.raises(ConfigError, match=f"no program for 64x64.*{WIDTH}x{HEIGHT}"):
        model(prompt, height=64, width=64)
    for ids in ([], [[]], [[1] * 545], [[259]], [[-1]]):
        with pytest.raises(ConfigError, match=r"token ids"):
            model.encode(ids)


def test_odd_arguments_are_taken_or_refused(model):
    """`run` takes whatever it is given; all before it is checked."""
    sweep(model.__call__, prompt=PromptEmbeds(torch.zeros(1, 4, 32), (4,)))
    sweep(model.encode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(output="model.zip"), "must end in .pt2"),
        (dict(output="nowhere/model.pt2"), "folder"),
        (dict(sizes=[(17, 16)]), "height 17 must be a multiple"),
        (dict(nfe=9), "at most 8"),
        (dict(device="tpu"), "not a device"),
    ],
)
def test_exports_that_cannot_work_are_refused_before_compiling(small, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(program, "compile_into", lambda *a: pytest.fail("compiled"))
    output = tmp_path / options.pop("output", "model.pt2")
    with pytest.raises(ConfigError, match=message):
        export_model(small, output, **{"device": "cpu", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_disagrees_is_not_written(small, exported, tmp_path, monkeypatch):
    """The comparison runs on the programs that were compiled; here they are another model's."""
    reader = Reader(exported)
    monkeypatch.setattr(program, "compile_into", lambda writer, name, *a: None)
    monkeypatch.setattr(program, "Exported", lambda path: twinflow_rt.load_exported(exported))
    monkeypatch.setattr(program.Generate, "forward", lambda self, x, *rest: torch.zeros(len(x), *SIZE, 3).byte())
    assert reader.manifest["nfe"] == 2
    with pytest.raises(TwinFlowError, match=r"off by .* of 255"):
        export_model(small, tmp_path / "model.pt2", sizes=[SIZE], nfe=2, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_what_torch_cannot_compile_is_an_error_of_ours(tmp_path, monkeypatch):
    class Refused(torch.nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(TwinFlowError, match="cannot compile it"):
        program.compile_into(Writer(tmp_path / "w.pt2"), "it", Refused(), (torch.ones(2),), ({},), None)


def test_damaged_files_are_refused(exported, tmp_path):
    whole = exported.read_bytes()
    manifest = json.dumps({"format": 1}).encode()
    cases = {
        "cut.pt2": (whole[: len(whole) // 2], "no exported model, or a part"),
        "empty.pt2": (b"", "no exported model, or a part"),
        "text.pt2": (b"not a zip file" * 100, "no exported model, or a part"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            twinflow_rt.load_exported(tmp_path / name)
    with pytest.raises(CheckpointError, match="missing"):
        twinflow_rt.load_exported(tmp_path / "absent.pt2")
    for content, message in ((manifest, "lacks device"), (b'{"format": 2}', "schema 2"), (b"[]", "schema None")):
        bare = tmp_path / "bare.pt2"
        file = torch._C.PyTorchFileWriter(str(bare))
        file.write_record(MANIFEST, content, len(content))
        file.write_end_of_file()
        with pytest.raises(CheckpointError, match=message):
            twinflow_rt.load_exported(bare)


def test_a_changed_weight_is_found(exported, tmp_path):
    reader = Reader(exported)
    key = max(reader.manifest["weights"], key=lambda k: reader.weight(k).nbytes)
    start = reader._file.get_record_offset(f"data/twinflow/{key}")
    changed = tmp_path / "changed.pt2"
    shutil.copy(exported, changed)
    with changed.open("r+b") as file:
        file.seek(start)
        byte = file.read(1)
        file.seek(start)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match="does not match its hash"):
        twinflow_rt.load_exported(changed)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("torch", "2.1.0", "compiled by torch 2.1"), ("cpu", "AVX10", "processors with AVX10")],
)
def test_files_for_other_machines_are_refused(exported, monkeypatch, field, value, message):
    from twinflow_rt.export import runtime

    real = runtime.Reader

    def reader(path):
        found = real(path)
        found.manifest[field] = value
        return found

    monkeypatch.setattr(runtime, "Reader", reader)
    with pytest.raises(CheckpointError, match=message):
        twinflow_rt.load_exported(exported)


def test_weights_keep_their_layout_and_are_stored_once(tmp_path):
    path = tmp_path / "weights.pt2"
    writer = Writer(path)
    plain = torch.arange(24.0).view(1, 2, 3, 4)
    last = plain.contiguous(memory_format=torch.channels_last)
    constants = {"a": plain, "b": plain.clone(), "c": last, "d": torch.empty(0, 3), "e": torch.tensor(7)}
    writer.add_program("one", [], constants.items())
    writer.add_program("two", [], [("z", plain)])
    rest = dict.fromkeys(("device", "dtype", "prompt", "latent", "noise", "sizes"))
    writer.close(rest)
    reader = Reader(path)
    reader.verify()
    keys = reader.manifest["programs"]["one"]["constants"]
    assert keys["a"] == keys["b"] == reader.manifest["programs"]["two"]["constants"]["z"] != keys["c"]
    assert len(reader.manifest["weights"]) == 4
    for name, tensor in constants.items():
        found = reader.weight(keys[name])
        assert torch.equal(found, tensor) and found.stride() == tensor.stride() and found.dtype == tensor.dtype
    for shape, strides, count in (((2, 3), (3, 1), 6), ((4, 2), (0, 1), 2), ((0, 5), (5, 1), 0)):
        assert storage_elements(shape, strides) == count


def test_a_killed_export_leaves_nothing_that_loads(small, tmp_path):
    """Killed while it compiles: no file under the name, and nothing beside it that a loader takes."""
    code = "import sys; from twinflow_rt.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["export", str(small), "-o", str(tmp_path / "model.pt2"), "--size", "16x16", "--device", "cpu"]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True) as child:
        for line in child.stderr:
            if "compiling" in line:
                break
        time.sleep(1)
        assert child.poll() is None
        os.kill(child.pid, signal.SIGKILL)
    assert not (tmp_path / "model.pt2").exists()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    for path in left:
        with pytest.raises(CheckpointError):
            twinflow_rt.load_exported(path)


def test_command_line_reports_what_it_wrote(small, exported, tmp_path, monkeypatch, capsys):
    from twinflow_rt.cli import main

    asked = {}

    def fake(model, output, **options):
        asked.update(options, model=model)
        shutil.copy(exported, output)
        return twinflow_rt.load_exported(exported).manifest

    monkeypatch.setattr(program, "export_model", fake)
    output = tmp_path / "m.pt2"
    assert main(["export", str(small), "-o", str(output), "--size", "24x16", "--size", "16", "--nfe", "2"]) == 0
    assert asked["sizes"] == [(16, 24), (16, 16)] and asked["nfe"] == 2
    assert f"wrote {output}: z-image, float32, 2 evaluation(s), 24x16" in capsys.readouterr().out
    assert main(["export", str(small), "-o", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "z-image"


@pytest.mark.full
@pytest.mark.parametrize("family", ["qwen_image", "sana", "sd3"])
def test_other_families(family, tmp_path):
    """A comparison with the model is part of every export; SD3.5's prompts have a pooled form and no lengths."""
    from importlib import import_module

    folder = import_module(f"{family}_factory").make_model(tmp_path / "model")
    whole = family != "sd3"
    pipe = twinflow_rt.load(folder, device="cpu")
    size = pipe.sizes.resolve(None, None)
    manifest = export_model(folder, tmp_path / "m.pt2", device="cpu", text_encoder=whole, options=QUICK)
    model = twinflow_rt.load_exported(tmp_path / "m.pt2")
    embeds = pipe.text(PROMPTS)
    wanted = torch.from_numpy(pipe(embeds, seed=5, output="np").images)
    assert off_by(model(embeds, seed=5), wanted) <= 1
    assert manifest["sizes"] == [list(size)] and bool(manifest["prompt"]["extras"]) == (not whole)


@pytest.mark.full
def test_demo_as_users_export_it(tmp_path):
    """The shipped model with the compiler's own settings, two sizes sharing their weights."""
    sizes = [(64, 64), (64, 96)]
    export_model("demo", tmp_path / "demo.pt2", sizes=sizes, text_encoder=True, device="cpu")
    model, pipe = twinflow_rt.load_exported(tmp_path / "demo.pt2"), twinflow_rt.load("demo", device="cpu")
    embeds = pipe.text(["a red circle", "a green triangle"])
    for height, width in sizes:
        call = {"height": height, "width": width, "seed": 3, "num_images": 2}
        assert off_by(model(embeds, **call), torch.from_numpy(pipe(embeds, output="np", **call).images)) <= 1
    programs = model.manifest["programs"]
    shared = [set(programs[f"image_{h}x{w}"]["constants"].values()) for h, w in sizes]
    assert len(shared[0] & shared[1]) > 0.9 * len(shared[0])
