"""hf:// models: what is fetched, from which commit, that it is what the hub records, and every refusal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.bad_input.conftest import refused
from tests.bad_input.fake_hub import COMMIT, Hub, serving
from twinflow_rt.checkpoint import hub
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.planning.description import describe

WEIGHTS = "diffusion_pytorch_model.safetensors"

REPO = "owner/tiny"
# asks for each (name, download, and what without) in turn: the folder, or the refusal
SCRIPT = """
import json, sys
from twinflow_rt.checkpoint import hub
from twinflow_rt.errors import TwinFlowError
assert "torch" not in sys.modules
for name, *options in json.loads(sys.argv[1]):
    try:
        print(json.dumps(["folder", str(hub.folder(name, *options))]))
    except TwinFlowError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture
def repo(source, tmp_path) -> Hub:
    """The tiny model, and what a real repository has beside it, at its root and once more in a subfolder."""
    folder = shutil.copytree(source, tmp_path / "repo")
    for name, content in (
        ("README.md", "# tiny"), ("pipeline.py", "raise SystemExit"), ("transformer/modeling.py", "raise SystemExit"),
        ("transformer/diffusion_pytorch_model.bin", "\x80\x04N."),
    ("transformer/diffusion_pytorch_model.fp16.safetensors", "x"),
        ("all-in-one.safetensors", "x"), ("assets/picture.png", "x"), ("vae/training_state.pt", "x"),
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    shutil.copytree(source, folder / "variants" / "small")
    return Hub(REPO, folder)


@pytest.fixture
def ask(tmp_path):
    """Runs SCRIPT with a cache of its own; endpoint None: no hub can be reached."""

    def run(endpoint: str | None, *asked: tuple[Any, ...], **variables: str) -> list[tuple[str, str]]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        env |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint or "http://127.0.0.1:9",
    "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
        command = [sys.executable, "-c", SCRIPT, json.dumps(asked)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    return run


def test_fetching(source, repo, ask):
    plain, inner, pinned = f"hf://{REPO}", f"hf://{REPO}@main/variants/small/", f"hf://{REPO}@{COMMIT}"
    with serving(repo) as endpoint:
        before, (kind, folder), again = ask(endpoint, (plain, False), (plain, True), (plain, False))
        assert before[0] == "CheckpointError" and "download=True" in before[1]
        assert (kind, again) == ("folder", ("folder", folder)) and Path(folder).name == COMMIT
        wanted = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
        assert set(repo.asked) == wanted and len(repo.asked) == len(wanted), "only what loading reads, once"
        assert describe(Path(folder)).parts == describe(source).parts
        (_, small), (_, same) = ask(endpoint, (inner, True), (pinned, True))
        assert small == f"{folder}/variants/small" and same == folder
        assert describe(Path(small)).parts == describe(source).parts
        assert len(repo.asked) == len(wanted), "blobs are shared"
    offline = ask(None, (plain, False), (pinned, False), (inner, False))
    assert offline == [("folder", folder), ("folder", folder), ("folder", small)]
    assert ask(None, (plain, True))[0][0] == "CheckpointError"


def test_a_file_and_its_base(source, repo, ask):
    """A file of the hub, and the base of it there, of which the weights that it replaces are not fetched."""
    shutil.copy(repo.folder / "vae" / WEIGHTS, repo.folder / "vae-only.safetensors")
    file, absent = f"hf://{REPO}/vae-only.safetensors", f"hf://{REPO}/other.gguf"
    with serving(repo) as endpoint:
        asked = (file, False), (file, True), (absent, True), (f"hf://{REPO}", True, ["vae"])
        before, (_, path), missing, (_, folder) = ask(endpoint, *asked)
    assert "not in the local cache" in before[1] and "no other.gguf at hf://owner/tiny@main" in missing[1]
    assert Path(path).read_bytes() == (source / "vae" / WEIGHTS).read_bytes()
    assert Path(path) == Path(folder) / "vae-only.safetensors"
    assert (Path(folder) / "text_encoder" / "model.safetensors").is_file()
    assert "vae/config.json" in repo.asked and f"vae/{WEIGHTS}" not in repo.asked


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_damaged_files_are_refused_and_removed(repo, ask, name):
    """Right length, wrong content: a large file, whose SHA-256 is recorded, and a small one (git's name)."""
    repo.lies = {name}
    with serving(repo) as endpoint:
        (kind, message), *_ = ask(endpoint, (f"hf://{REPO}", True))
        assert kind == "CheckpointError" and f"{Path(name).name} is not what the hub records" in message
        repo.lies = set()
        assert ask(endpoint, (f"hf://{REPO}", True))[0][0] == "folder", "fetched anew"


def test_refusals_of_the_hub(repo, ask):
    (repo.folder / "variants" / "small" / "model_index.json").unlink()
    asked = [
        ("hf://owner/other", "log in with `hf auth login`"), (f"hf://{REPO}@no-such-revision", "check the revision"),
        (f"hf://{REPO}/nowhere", "no model_index.json"), (f"hf://{REPO}/variants/small", "no model_index.json"),
    ]  # fmt: skip
    with serving(repo) as endpoint:
        answers = ask(endpoint, *((name, True) for name, _ in asked))
        for (kind, message), (name, expected) in zip(answers, asked, strict=True):
            assert kind == "CheckpointError" and expected in message and "\n" not in message, (name, message)
        repo.gated = True
        assert "accept its terms" in ask(endpoint, (f"hf://{REPO}", True))[0][1]
        assert "HF_HUB_OFFLINE is set" in ask(endpoint, (f"hf://{REPO}", True), HF_HUB_OFFLINE="1")[0][1]
    assert "check the network" in ask(None, (f"hf://{REPO}", True))[0][1]
    assert repo.asked == []


def test_a_branch_that_moves_meanwhile(tmp_path, monkeypatch):
    info = SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename="model_index.json", lfs=None, blob_id="0")])
    client = SimpleNamespace(
        HfApi=lambda: SimpleNamespace(model_info=lambda *a, **k: info),
        snapshot_download=lambda *a, **k: str(tmp_path / "another-commit"),
    )
    monkeypatch.setattr(hub, "_client", lambda: client)
    refused(lambda: hub.folder(f"hf://{REPO}", True), "changed while it was fetched", CheckpointError)


def test_caches_that_cannot_be_written(monkeypatch):
    """No home folder, and a disk that refuses: said as what they are, not as a network that fails."""
    full = OSError(28, "No space left on device")
    client = SimpleNamespace(HfApi=lambda: SimpleNamespace(model_info=lambda *a, **k: (_ for _ in ()).throw(full)))
    monkeypatch.setattr(hub, "_client", lambda: client)
    monkeypatch.setenv("HF_HOME", "/x")
    refused(lambda: hub.folder("hf://a/b", download=True), "No space left.*free some space, or set HF_HOME")
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    refused(lambda: hub.folder("hf://a/b", download=True), "no home folder to keep hf://a/b@main in: set HF_HOME")


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: hub.folder(f"hf://{REPO}"), "pip install huggingface_hub", ConfigError)


NAMES = {
    "hf://a/b": ("a/b", "main", ""), "hf:/a/b": ("a/b", "main", ""), "hf://a/b/": ("a/b", "main", ""),
    "hf://a-1/b.c_d@v1.0": ("a-1/b.c_d", "v1.0", ""), "hf://a/b/c/d": ("a/b", "main", "c/d/"),
    "hf://a/b@x/c": ("a/b", "x", "c/"), "hf://a/b@x/c/d.gguf": ("a/b", "x", "c/d.gguf"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "parts"), NAMES.items())
def test_names(name, parts):
    source = hub.parse(name)
    assert (source.repo, source.revision, source.subfolder) == parts and str(source).startswith(f"hf://{parts[0]}@")


def test_only_what_loading_reads_is_fetched():
    names = [
        "model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json", "tokenizer_2/vocab.json", "tokenizer/merges.txt",
        "tokenizer/chat_template.jinja", "text_encoder_3/model.safetensors", "connector/openuni.safetensors",
        "artifact.json", "scheduler/scheduler_config.json",
    ]  # fmt: skip
    others = [
        "transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder_3/model.fp8.safetensors", "x.safetensors",
        "transformer/a.bin", "transformer/a.pt", "transformer/code.py", "../vae/config.json",
        "transformer/inner/config.json", "feature_extractor/preprocessor_config.json", "vae/../../config.json",
    "config.json",
    ]  # fmt: skip
    assert hub.needed([*names, *others]) == sorted(names)
    assert hub.needed([f"in/{name}" for name in (*names, *others)], "in/") == sorted(f"in/{name}" for name in names)
