"""One small exported model and one build of the C++ library, for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import factory
import pytest
import torch

from twinflow_rt.export.program import export_model

ROOT = Path(__file__).parents[2]
EMBED = ROOT / "csrc" / "embed"
SIZE = (16, 24)  # height, width
SECONDS = 600  # more than any command takes, less than a hang
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # pip's cmake and ninja first
# off: what costs the compiler time and changes no result
QUICK = {
    "pattern_matcher": False, "cpp.simdlen": 0,
    "aot_inductor.debug_compile": True, "aot_inductor.precompile_headers": False,
}  # fmt: skip
NETWORK = dict(dim=24, n_heads=1, n_kv_heads=1, n_layers=1, n_refiner_layers=0)
VAE = dict(
    block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), mid_block_add_attention=False,
    up_block_types=("UpDecoderBlock2D",), sample_size=16,
)  # fmt: skip
TEXT = dict(
    vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip


def require(*tools: str) -> None:
    if missing := [tool for tool in tools if not shutil.which(tool, path=PATH)]:
        pytest.skip(f"needs {' and '.join(missing)}")


def run(*command: object, code: int = 0, skip_if_said: str | None = None) -> str:
    """stdout and stderr of a command, which must end with `code`. skip_if_said: words with which it may say that this
    machine lacks something."""
    words = [str(word) for word in command]
    place = {**os.environ, "PATH": PATH}
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, env=place, check=False)
    if skip_if_said and skip_if_said in done.stderr:
        pytest.skip(skip_if_said)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A Z-Image model folder of one block in each network."""
    from transformers import Qwen3Config, Qwen3Model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "TRANSFORMER", {**factory.TRANSFORMER, **NETWORK})
        patch.setattr(factory, "VAE", {**factory.VAE, **VAE})
        patch.setattr(factory, "text_encoder", lambda head: Qwen3Model(Qwen3Config(**TEXT)))
        return factory.make_model(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def exported(small, tmp_path_factory) -> Path:
    """The model as one file: two evaluations, so that noise is injected, and the text encoder."""
    require("c++")
    path = tmp_path_factory.mktemp("exported") / "small.pt2"
    export_model(small, path, sizes=[SIZE], nfe=2, text_encoder=True, device="cpu", options=QUICK)
    return path


def build(source: Path, folder: Path, *prefixes: Path) -> Path:
    """Configures and builds, without optimisation, a CMake project that finds torch and what is installed at
    `prefixes`; returns the build folder."""
    require("c++", "cmake", "ninja")
    found = ";".join(map(str, [torch.utils.cmake_prefix_path, *prefixes]))
    flags = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -Werror", f"-DCMAKE_PREFIX_PATH={found}"]
    needs = "csrc/embed needs nlohmann-json and stb_image_write.h"
    run("cmake", "-S", source, "-B", folder, "-G", "Ninja", *flags, skip_if_said=needs)
    run("cmake", "--build", folder)
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The C++ library and its example: a build folder."""
    return build(EMBED, tmp_path_factory.mktemp("embed"))


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory) -> Path:
    """The C++ library and its example, installed: a prefix."""
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", built, "--prefix", prefix)
    return prefix


@pytest.fixture(scope="session")
def embed(installed) -> Path:
    """The example program."""
    return installed / "bin" / "twinflow-embed"
