"""Model folders: whatever is wrong with a file, `load` and `twinflow-rt inspect` say which and why."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.conftest import edit_json, refused
from tests.bad_input.tensors import BAD
from tests.factory import WEIGHTS, shard
from twinflow_rt import cli
from twinflow_rt.bench import random_file
from twinflow_rt.checkpoint import files
from twinflow_rt.checkpoint.tensor_files import READERS
from twinflow_rt.errors import CheckpointError
from twinflow_rt.loading import load
from twinflow_rt.planning.description import describe

T, TEXT, TOKENIZER, VAE = "transformer/config.json", "text_encoder/config.json", "tokenizer/", "vae/config.json"


def inspect(model: Path, message: str, capsys) -> None:
    """What `load` says, the command says in one line, with status 2."""
    refused(lambda: load(model, device="cpu"), message)
    assert cli.main(["inspect", str(model)]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("\n") == 1 and "Traceback" not in out.err
    assert out.err.startswith("twinflow-rt: ") and re.search(message, out.err)


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_safetensors(model, capsys, content, message):
    (model / "transformer" / WEIGHTS).write_bytes(content)
    inspect(model, message, capsys)


TEXTS = {
    "nothing": (b"", "not readable JSON"), "cut": (b'{"a": 1', "not readable JSON"), "a list": (b"[]", "JSON object"),
    "a number": (b"7", "JSON object"), "null": (b"null", "JSON object"), "UTF-16": ("{}".encode("utf-16"), "UTF-8"),
    "Latin-1": (b'{"\xe9": 1}', "UTF-8"), "a key twice": (b'{"dim": 1, "dim": 2}', "'dim' stands twice"),
    "NaN": (b'{"norm_eps": NaN}', "NaN is no JSON number"), "infinity": (b'{"a": -Infinity}', "no JSON number"),
    "lists nested deep": (b"[" * 200_000, "nested too deeply"), "deep": (b'{"a":' * 200_000, "nested too deeply"),
    "five thousand digits": (b'{"dim": ' + b"9" * 5000 + b"}", "not readable JSON"),
    "NUL": (b"\0" * 100, "not readable"),
    "a comment": (b"{} // x", "not readable JSON"), "a pickle": (b"\x80\x04N.", "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("file", ["model_index.json", T])
def test_json(model, capsys, file, content, message):
    (model / file).write_bytes(content)
    inspect(model, message, capsys)


@pytest.mark.parametrize("file", [TEXT, VAE, TOKENIZER + "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["deep", "a key twice", "UTF-16"])
def test_json_of_the_other_parts(model, capsys, file, kind):
    content, message = TEXTS[kind]
    (model / file).write_bytes(content)
    inspect(model, message, capsys)


def test_huge_json_is_not_read(model, capsys):
    with (model / T).open("wb") as file:
        file.truncate(files.MAX_TEXT + 1)
    inspect(model, "67,108,865 bytes; none has more", capsys)


CONFIGS = {
    "dim of text": (T, {"dim": "48"}, "dim"), "dim of nothing": (T, {"dim": None}, "dim"),
    "no heads": (T, {"n_heads": 0}, "ZeroDiv"), "dim of a fraction": (T, {"dim": 48.5}, "dim"),
    "dim of truth": (T, {"qk_norm": 1}, "qk_norm"),
    "a billion layers": (T, {"n_layers": 10**9}, "n_layers is 1000000000, beyond"),
    "layers of a list": (T, {"n_layers": [2]}, "n_layers"), "negative layers": (T, {"n_layers": -1}, "unknown"),
    "dim of 2^62": (T, {"dim": 2**62}, "dim is 4611686018427387904, beyond"),
    "channels of 2^40": (T, {"in_channels": 2**40}, "in_channels is 1099511627776, beyond"),
    "axes of text": (T, {"axes_dims": ["8", 8, 8]}, r"axes_dims\[0\] must be an integer"),
    "axes nested": (T, {"axes_lens": [[1], 32, 32]}, "axes_lens"),
    "axes of one": (T, {"axes_lens": [576]}, "three counts"),
    "axes too short for a prompt": (T, {"axes_lens": [1, 32, 32]}, "at least 34"),
    "axes of zero": (T, {"axes_lens": [576, 0, 0]}, "three counts"),
    "axes of a billion": (T, {"axes_lens": [10**9, 32, 32]}, "axes_lens"),
    "an unknown key": (T, {"surprise": 1}, "surprise"), "no class": (T, {"_class_name": ...}, "None"),
    "a class of a list": (T, {"_class_name": ["ZImageTransformer2DModel"]}, "supported families"),
    "eps of text": (T, {"norm_eps": "tiny"}, "norm_eps"),
    "eps of infinity": (T, {"norm_eps": float("1e400")}, "no JSON number"),
    "theta of a list": (T, {"rope_theta": []}, "rope_theta"),
    "another width": (T, {"cap_feat_dim": 33}, "does not fit"),
    "vocabulary of nothing": (TEXT, {"vocab_size": ...}, "lacks 'vocab_size'"),
    "vocabulary of text": (TEXT, {"vocab_size": "many"}, "vocab_size"),
    "vocabulary too small": (TEXT, {"vocab_size": 3}, "different models"),
    "no attention heads": (TEXT, {"num_attention_heads": 0, "head_dim": ...}, "ZeroDiv"),
    "a million blocks": (TEXT, {"num_hidden_layers": 10**6}, "beyond"),
    "sizes of 2^40": (TEXT, {"intermediate_size": 2**40}, "beyond"),
    "rope of a list": (TEXT, {"rope_parameters": [1]}, "no object"),
    "heads of no size": (TEXT, {"head_dim": 0}, "head_dim is 0; it must be positive"),
    "a mask of windows": (TEXT, {"layer_types": 7}, "TypeError"),
    "negative hidden size": (TEXT, {"hidden_size": -32}, "download"),
    "groups that do not divide": (VAE, {"norm_num_groups": 5}, "ValueError"),
    "no groups": (VAE, {"norm_num_groups": 0}, "ZeroDiv"),
    "channels of text": (VAE, {"block_out_channels": "wide"}, "download"),
    "no channels": (VAE, {"block_out_channels": []}, "download"),
    "a thousand blocks": (VAE, {"block_out_channels": [8] * 2000}, "beyond|download"),
    "theta of zero": (T, {"rope_theta": 0}, "must be positive"),
    "scale of times of zero": (T, {"t_scale": 0.0}, "must be positive"),
    "negative eps": (T, {"norm_eps": -1e-5}, "must not be negative"),
    "negative eps of text": (TEXT, {"rms_norm_eps": -1}, "must not be negative"),
    "scaling of zero": (VAE, {"scaling_factor": 0}, "scaling_factor is 0; it must be positive"),
    "negative scaling": (VAE, {"scaling_factor": -0.3}, "must be positive"),
    "scaling of text": (VAE, {"scaling_factor": "1"}, "scaling"),
    "sample size of text": (VAE, {"sample_size": "big"}, "sample_size"),
    "sample size of nothing": (VAE, {"sample_size": []}, "IndexError"),
    "latents of 5": (VAE, {"latent_channels": 5}, "does not fit"),
    "block types of numbers": (VAE, {"up_block_types": 3}, "TypeError"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configs(model, capsys, file, changes, message):
    edit_json(model / file, **changes)
    inspect(model, message, capsys)


TOKENIZERS = {
    "empty": ("tokenizer.json", b"", "not a tokenizer"), "no tokenizer": ("tokenizer.json", b"{}", "not a tokenizer"),
    "deep": ("tokenizer.json", b'{"a":' * 200_000, "not a tokenizer"),
    "NUL": ("tokenizer.json", bytes(50), "not a tokenizer"),
    "huge numbers": ("tokenizer.json", b'{"version": 1e999}', "not a tokenizer"),
    "template that does not end": ("chat_template.jinja", b"{% for a in b %}", "does not compile"),
    "template of bytes": ("chat_template.jinja", b"\xff\xfe", "UTF-8"),
    "unknown extension": ("chat_template.jinja", b"{% import_os %}", "does not compile"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "content", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers(model, capsys, file, content, message):
    (model / "tokenizer" / file).write_bytes(content)
    inspect(model, message, capsys)


TEMPLATES = {
    "no such name": "{{ nothing.at.all }}", "private attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a module": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "too long a range": "{% for i in range(10**9) %}{% endfor %}", "division by zero": "{{ 1 // 0 }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "an index": "{{ messages[9].content }}",
    "changing the messages": "{{ messages.append(1) }}", "a call of text": "{{ 'a'() }}", "nothing at all": "",
}  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates_run_in_a_sandbox(model, template):
    (model / "tokenizer" / "chat_template.jinja").write_text(template)
    pipe = load(model, device="cpu")
    refused(lambda: pipe("a", height=16, width=16), "chat template.* download")


def test_slow_tokenizers(model, capsys):
    """vocab.json and merges.txt in place of tokenizer.json."""
    folder, config = model / "tokenizer", model / "tokenizer" / "tokenizer_config.json"
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    inspect(model, "tokenizer.json is missing", capsys)
    edit_json(config, tokenizer_class=7)
    inspect(model, "tokenizer.json is missing", capsys)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    edit_json(config, tokenizer_class="Qwen2Tokenizer")
    inspect(model, "merges.txt do not fit", capsys)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"content": "a", "special": 3}
    for damage in ({"x": {"content": "y"}}, {"1": 3}, {"1": {}}, [1], {"1": {"content": 3}}, {"1": special}):
        edit_json(config, added_tokens_decoder=damage)
        inspect(model, "added_tokens_decoder is damaged", capsys)
    edit_json(config, added_tokens_decoder={"100000": {"content": "<new>"}})
    inspect(model, "should be 100000", capsys)


# -- what stands where a file should be -------------------------------------------------------------

FILES = ["model_index.json", T, "transformer/" + WEIGHTS, TOKENIZER + "tokenizer.json", TEXT, VAE]


@pytest.mark.parametrize("file", FILES)
def test_a_folder_in_place_of_a_file(model, capsys, file):
    (model / file).unlink()
    (model / file).mkdir()
    inspect(model, "is a folder, where a file is expected|no .safetensors file", capsys)


@pytest.mark.parametrize("file", FILES)
def test_a_pipe_in_place_of_a_file_does_not_hang(model, capsys, file):
    (model / file).unlink()
    os.mkfifo(model / file)
    inspect(model, "pipe, socket or device", capsys)


@pytest.mark.parametrize("file", FILES)
def test_a_link_to_nothing(model, capsys, file):
    (model / file).unlink()
    (model / file).symlink_to("nowhere")
    inspect(model, "link to nothing", capsys)


@pytest.mark.parametrize("file", FILES)
def test_a_link_to_itself(model, capsys, file):
    (model / file).unlink()
    (model / file).symlink_to(Path(file).name)
    inspect(model, "cannot be read", capsys)


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "../../secret.json"])
def test_links_out_of_the_folder(model, capsys, target):
    (model.parent.parent / "secret.json").write_text("{}")
    (model / VAE).unlink()
    (model / VAE).symlink_to(target)
    inspect(model, "outside the model folder; put the file itself", capsys)


@pytest.mark.parametrize("part", ["transformer", "tokenizer"])
def test_linked_parts_of_another_model(source, model, capsys, part):
    shutil.rmtree(model / part)
    (model / part).symlink_to(source / part)
    inspect(model, "outside the model folder; .* load the folder", capsys)


def test_links_that_stay_are_followed(source, model):
    (model / "shared").mkdir()
    shutil.move(model / "transformer" / WEIGHTS, model / "shared" / WEIGHTS)
    (model / "transformer" / WEIGHTS).symlink_to(f"../shared/{WEIGHTS}")
    (model.parent / "link").symlink_to(model)
    assert describe(model.parent / "link").parts == describe(source).parts


def test_links_into_the_hubs_cache_are_followed(source, model, tmp_path):
    """A snapshot's files are links to blobs beside it; those of another repository stay out of reach."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123" / "inner"
    blobs.mkdir(parents=True)
    for i, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        shutil.copy(path, blobs / str(i))
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(i), link.parent))
    assert describe(snapshot).parts == describe(source).parts
    foreign = tmp_path / "models--c--d" / "blobs" / "0"
    foreign.parent.mkdir(parents=True)
    shutil.copy(source / "model_index.json", foreign)
    (snapshot / "model_index.json").unlink()
    (snapshot / "model_index.json").symlink_to(foreign)
    refused(lambda: describe(snapshot), "outside the model folder", CheckpointError)


def test_too_many_files_are_not_walked(model, capsys, monkeypatch):
    monkeypatch.setattr(files, "MAX_ENTRIES", 10)
    inspect(model, "more than 10 files", capsys)


@contextmanager
def without_permission(path: Path):
    """`path` unreadable, for root too."""
    before = path.stat().st_mode
    path.chmod(0)
    uid = os.geteuid()
    for parent in path.parents[:3]:
        parent.chmod(0o755)
    try:
        if uid == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(uid)
        path.chmod(before)


@pytest.mark.parametrize("file", [*FILES, "transformer"])
def test_no_permission(source, tmp_path_factory, capsys, file):
    folder = Path("/tmp" if os.geteuid() == 0 else tmp_path_factory.mktemp("p")) / f"twinflow-rt-{os.getpid()}"
    try:
        model = shutil.copytree(source, folder / "m")
        with without_permission(model / file):
            refused(lambda: describe(model), "[Pp]ermission|no .safetensors file|not a tokenizer")
            assert cli.main(["inspect", str(model)]) == 2
    finally:
        shutil.rmtree(folder)


# -- shards -----------------------------------------------------------------------------------------


def index_of(model: Path) -> Path:
    shard(model / "transformer")
    return model / "transformer" / (WEIGHTS + ".index.json")


def rename_all(model: Path, name: object) -> None:
    index = index_of(model)
    edit_json(index, weight_map=dict.fromkeys(json.loads(index.read_text())["weight_map"], name))


NAMES = [
    "../vae/" + WEIGHTS, "/etc/passwd", "/etc/x.safetensors", "..", ".", "", "../../x.safetensors", "sub/x.safetensors",
    "..\\x.safetensors/../y", "x.bin", "a\0b.safetensors", "x" * 300 + ".safetensors",
    "nowhere.safetensors", "\ud800.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_shards_that_are_elsewhere(model, capsys, name):
    rename_all(model, name)
    inspect(model, "not a .safetensors file of its own folder|is missing|cannot be read", capsys)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"a": 1}, {"a": None}, {"a": ["b"]}, ...])
def test_indices_without_a_map(model, capsys, weight_map):
    edit_json(index_of(model), weight_map=weight_map)
    inspect(model, "no weight_map|no \\.safetensors|without any tensor", capsys)


def test_two_indices(model, capsys):
    shutil.copy(index_of(model), model / "transformer" / "other.safetensors.index.json")
    inspect(model, "several indices", capsys)


def test_shards_that_are_links_out(source, model, capsys):
    index_of(model)
    path = next((model / "transformer").glob("*00002*"))
    shutil.move(path, model.parent / path.name)
    path.symlink_to(model.parent / path.name)
    inspect(model, "outside the model folder", capsys)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
FOREIGN = {
    "GGUF": (
        b"GGUF\3\0\0\0" + bytes(64),
        "is a GGUF file; these are read as a network's weights, under a name that ends in .gguf",
    ),
    "LFS": (LFS, "is a Git LFS pointer in place of the file; download that with `git lfs pull`"),
    "a pickle": (b"PK\3\4" + bytes(64), "is a pickle of torch.save.*convert it with safetensors"),
    "a page": (b"\n<!DOCTYPE html><html>", "is a web page in place of the file; download the file itself"),
}


@pytest.mark.parametrize(("content", "message"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("file", ["transformer/" + WEIGHTS, "text_encoder/model.safetensors", VAE])
def test_files_of_another_kind_are_named(model, capsys, file, content, message):
    (model / file).write_bytes(content)
    inspect(model, f"{file} {message}", capsys)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers_that_are_lfs_pointers(model, capsys, file):
    (model / "tokenizer" / file).write_bytes(LFS)
    inspect(model, "is a Git LFS pointer", capsys)


def test_what_a_config_says_of_quantization_decides_nothing(model):
    edit_json(model / T, quantization_config={"quant_method": "gptq", "bits": 4})
    load(model, device="cpu")


# -- tensors ----------------------------------------------------------------------------------------

KEY = "layers.0.attention.to_q.weight"
TENSORS = {
    "missing": (lambda t: t.pop(KEY), f"missing {KEY}"), "all missing": (lambda t: t.clear(), "without any tensor"),
    "extra": (lambda t: t.update({"x\0y": torch.ones(1)}), "unknown"),
    "many extra": (lambda t: t.update({f"x{i}": torch.ones(1) for i in range(1000)}), "and 992 more"),
    "int64": (lambda t: t.update({KEY: t[KEY].long()}), "stored as I64"),
    "gptq": (lambda t: t.update({KEY.replace("weight", "qweight"): t.pop(KEY).int()}), "qweight is quantized by GPTQ"),
    "bool": (lambda t: t.update({KEY: t[KEY].bool()}), "stored as BOOL"),
    "int8": (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), f"{KEY} is stored as I8 without its scale"),
    "complex": (lambda t: t.update({KEY: t[KEY].cfloat()}), "stored as C64"),
    "transposed": (lambda t: t.update({KEY: t[KEY][:40].T.contiguous()}), "has shape"),
    "flat": (lambda t: t.update({KEY: t[KEY].flatten()}), "has shape"),
    "scalar": (lambda t: t.update({KEY: torch.tensor(1.0)}), "has shape"),
    "empty": (lambda t: t.update({KEY: torch.ones(0, 48)}), "has shape"),
    "of a thousand axes": (lambda t: t.update({KEY: t[KEY].view(48, *[1] * 60, 48)}), "has shape"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors(model, capsys, change, message):
    path = model / "transformer" / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    inspect(model, message, capsys)


def test_a_name_with_and_without_its_prefix(model, capsys):
    path = model / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, "model." + name: tensors[name].clone()}, path)
    inspect(model, "stands twice, with and without model.", capsys)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 5000, -1000, -1])
def test_cut_downloads(model, capsys, keep):
    path = model / "text_encoder" / "model.safetensors"
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    inspect(model, "truncated or no safetensors file", capsys)


RANDOM = [
    {"dtype": "I8", "seed": 0, "tensors": {}}, {"dtype": "F32", "seed": "x", "tensors": {}},
    {"dtype": "F32", "seed": 0},
    {"dtype": [], "seed": 0, "tensors": {}}, {"dtype": "F32", "seed": 0, "tensors": {"a": ["x"]}},
    {"dtype": "F32", "seed": 0, "tensors": [1]}, {"dtype": "F32", "seed": 0, "tensors": {"a": [2**60, 2**60]}},
]  # fmt: skip


@pytest.mark.parametrize("content", RANDOM, ids=str)
def test_declared_random_weights(model, capsys, content):
    assert random_file.FILE in READERS
    (model / "transformer" / WEIGHTS).unlink()
    (model / "transformer" / random_file.FILE).write_text(json.dumps(content))
    inspect(model, "declares no random weights|missing|without any tensor", capsys)


def test_pickles_are_never_opened(model, capsys):
    """Loading never runs code: a pickle that would leave a mark is there, and no mark."""
    mark = model.parent / "mark"
    bomb = b"cos\nsystem\n(S'touch %s'\ntR." % str(mark).encode()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.pt", "x.ckpt"):
        (model / "transformer" / name).write_bytes(bomb)
    (model / "transformer" / "modeling_custom.py").write_text(f"open({str(mark)!r}, 'w')")
    edit_json(model / "model_index.json", trust_remote_code=True)
    load(model, device="cpu")
    (model / "transformer" / WEIGHTS).unlink()
    inspect(model, "only pickles .* can run code", capsys)
    assert not mark.exists()


def test_as_a_process(model):
    """The same through a real process: one line, status 2, nothing on stdout."""
    (model / T).write_bytes(b"[" * 200_000)
    command = [sys.executable, "-m", "twinflow_rt.cli", "inspect", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "nested too deeply" in done.stderr
