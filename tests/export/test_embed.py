"""The C++ library: the same images as Python, from the same file, and a sentence for whatever cannot work."""

from __future__ import annotations

import json
import re
import shutil
import struct
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import twinflow_rt
from tests.export.conftest import EMBED, SIZE, build, run

HEIGHT, WIDTH = SIZE
SEED = 2**40 + 5


@pytest.fixture(scope="module")
def model(exported):
    return twinflow_rt.load_exported(exported)


@pytest.fixture(scope="module")
def ids():
    return [[5, 6, 7, 8, 9, 10, 11], [3] * 40]


@pytest.fixture(scope="module")
def prompt(model, ids, tmp_path_factory):
    embeds = model.encode(ids)
    path = tmp_path_factory.mktemp("prompt") / "prompt.safetensors"
    save_file({"prompt_embeds": embeds.embeds, "lengths": torch.tensor(embeds.lengths)}, path, {"format": "pt"})
    return embeds, path


def pictures(folder, count: int) -> torch.Tensor:
    names = ["out.png"] if count == 1 else [f"out-{k}.png" for k in range(count)]
    found = [Image.open(folder / name) for name in names]
    assert all(image.mode == "RGB" and image.size == (WIDTH, HEIGHT) for image in found)
    return torch.stack([torch.from_numpy(np.array(image)) for image in found])


def test_images_from_embeddings_equal_pythons(embed, exported, model, prompt, tmp_path):
    """Seeds of 41 bits, two prompts of two lengths, two images each, noise injected between the steps."""
    embeds, path = prompt
    options = ["--prompt", path, "--size", f"{WIDTH}x{HEIGHT}", "--seed", SEED, "--num-images", 2, "--verify"]
    said = run(embed, exported, *options, "-o", tmp_path / "out.png")
    assert f"out-3.png (seed {SEED + 3})" in said
    wanted = model(embeds, seed=SEED, num_images=2)
    assert wanted.float().std() > 10
    assert (pictures(tmp_path, 4).int() - wanted.int()).abs().max() <= 1
    assert not list(tmp_path.glob("*.part"))


def test_images_from_token_ids_equal_pythons(embed, exported, model, ids, tmp_path):
    run(embed, exported, "--ids", ",".join(map(str, ids[0])), "-o", tmp_path / "out.png", "--seed", 7)
    wanted = model(model.encode(ids[:1]), seed=7)
    assert (pictures(tmp_path, 1).int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings(embed, exported, model, prompt, tmp_path, dtype):
    """Of every magnitude, subnormals included; without lengths all rows count."""
    values = torch.randn(1, 8, 32) * 10.0 ** torch.arange(-8.0, 0.0)[:, None]
    values = values.to(dtype)
    save_file({"prompt_embeds": values}, tmp_path / "p.safetensors")
    run(embed, exported, "--prompt", tmp_path / "p.safetensors", "-o", tmp_path / "out.png")
    wanted = model(twinflow_rt.PromptEmbeds(values, (8,)), seed=0)
    assert (pictures(tmp_path, 1).int() - wanted.int()).abs().max() <= 1


def test_info(embed, exported):
    said = run(embed, exported, "--info")
    assert f"size {WIDTH}x{HEIGHT}" in said and "2 evaluation(s)" in said and "text encoder: yes" in said


def test_arguments_that_cannot_work(embed, exported, prompt, tmp_path):
    given = (exported, "--prompt", prompt[1], "-o", tmp_path / "out.png")
    for words, message in (
        ((), "nothing to do"),
        ((*given, "--size", "64x64"), "no program for 64x64"),
        ((*given, "--seed", str(2**64)), "whole number"),
        ((*given, "--seed"), "needs a value"),
        ((*given, "--wrong"), "unknown argument"),
        ((tmp_path / "absent.pt2", "--info"), "cannot be read"),
        ((exported, "--prompt", prompt[1], "-o", tmp_path / "absent" / "out.png"), "cannot be written"),
    ):
        assert message in run(embed, *words, code=2), words
    assert list(tmp_path.iterdir()) == []


def safetensors(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape, start: int, end: int, dtype: str = "F32") -> dict:
    return {"prompt_embeds": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


BAD_PROMPTS = [
    (b"", "cut short"), (b"1234567", "cut short"), (safetensors({}, size=2**63), "cut short"),
    (safetensors({}, size=100), "cut short"), (safetensors(b"{"), "not JSON"),
    (safetensors(b"[" * 100), "nested too deeply"), (safetensors(b'{"a": {}, "a": {}}'), "twice"),
    (safetensors(b'{"a": "\\ud800"}'), "surrogate"),
    (safetensors(b'{"a": tru}'), "not JSON: parse error at line 1, column 10"),
    (safetensors(b"{} {}"), "expected end of input"), (safetensors(b'{"a":' * 100_000), "nested too deeply"),
    (safetensors(b"{}\0{}"), "zero byte"), (safetensors(b'{"a\0": 1}'), "zero byte"),
    (safetensors(b'{"a": "\xff"}'), "ill-formed UTF-8"), (safetensors(b'{"a": "line\n"}'), "control character"),
    (safetensors(b'{"a": ' + b"9" * 1000 + b"}"), "number overflow"), (safetensors({}), "lacks prompt_embeds"),
    (safetensors([]), "must be an object"), (safetensors({"prompt_embeds": 1}), "must be an object"),
    (safetensors(entry([1, 1, 32], 0, 128)), "beyond the end"),
    (safetensors(entry([1, 1, 32], -4, 124), bytes(128)), "beyond the end"),
    (safetensors(entry([1, 1, 32], 128, 0), bytes(128)), "beyond the end"),
    (safetensors(entry([1, 2, 32], 0, 128), bytes(128)), "do not fit"),
    (safetensors(entry([2**31, 2**31, 2**31], 0, 128), bytes(128)), "impossible shape"),
    (safetensors(entry([-1, 1, 32], 0, 128), bytes(128)), "impossible shape"),
    (safetensors(entry([1, 1, 0.5], 0, 128), bytes(128)), "whole number"),
    (safetensors(entry([1, 1, 2**63], 0, 128), bytes(128)), "whole number"),
    (safetensors(entry([1, 1, 10**30], 0, 128), bytes(128)), "whole number"),
    (safetensors(entry([1, 32], 0, 128), bytes(128)), r"[B, L, D]"),
    (safetensors(entry([1, 0, 32], 0, 0)), r"[B, L, D]"),
    (safetensors(entry([1, 1, 32], 0, 32, "F8_E4M3"), bytes(32)), "F8_E4M3"),
    (safetensors(entry([1, 1, 32], 0, 256, "I64"), bytes(256)), "floating point"),
    (safetensors(entry([1, 1, 16], 0, 64), bytes(64)), "[count, rows, 32]"),
    (safetensors(entry([1, 545, 32], 0, 545 * 128), bytes(545 * 128)), "545 rows"),
]  # fmt: skip


def test_prompt_files_that_cannot_work(user, exported, tmp_path):
    """All of them read and run by one process."""
    lengths = [entry([1, 4, 32], 0, 512) | {"lengths": {"dtype": "I64", "shape": [1], "data_offsets": [512, 520]}}]
    cases = BAD_PROMPTS + [
        (safetensors(lengths[0], bytes(512) + struct.pack("<q", n)), f"a prompt of {n} rows") for n in (0, 5, -1)
    ]
    paths = [tmp_path / f"{i}.safetensors" for i in range(len(cases))]
    for path, (content, _) in zip(paths, cases, strict=True):
        path.write_bytes(content)
    (tmp_path / "folder").mkdir()
    cases.append((b"", "cannot be read"))
    said = run(user, exported, "prompts", *paths, tmp_path / "folder").splitlines()
    assert len(said) == len(cases)
    for line, (content, message) in zip(said, cases, strict=True):
        assert message in line, (content[:80], line)


def test_damaged_models_are_refused(embed, exported, tmp_path):
    whole = exported.read_bytes()
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(whole[: len(whole) // 2])
    assert str(cut) in run(embed, cut, "--info", code=2)
    archive = twinflow_rt.load_exported(exported).archive
    key = max(archive.manifest["weights"], key=lambda k: archive.weight(k).nbytes)
    changed = tmp_path / "changed.pt2"
    shutil.copy(exported, changed)
    with changed.open("r+b") as file:
        file.seek(archive._file.get_record_offset(f"data/twinflow/{key}"))
        file.write(b"\xff")
    run(embed, changed, "--info")
    assert "does not match its hash" in run(embed, changed, "--info", "--verify", code=2)


USER = """
#include <cstdio>
#include <functional>
#include <twinflow_rt_embed.h>

// What the library says to something that cannot work.
void show(const std::function<void()>& call) {
  try {
    call();
    std::puts("no error");
  } catch (const twinflow::Error& error) {
    std::puts(error.what());
  }
}

int main(int count, char** words) {
  twinflow::Model model(words[1]);
  if (std::string(words[2]) == "prompts") {
    for (int i = 3; i < count; ++i) show([&] { model.generate(twinflow::read_prompt(words[i]), {0}); });
    return 0;
  }
  twinflow::Image image{2, 300, std::vector<uint8_t>(2 * 300 * 3)};
  for (size_t i = 0; i < image.pixels.size(); ++i) image.pixels[i] = static_cast<uint8_t>(i * 7);
  twinflow::write_png(words[3], image);
  for (const int64_t width : {int64_t{0}, int64_t{299}, int64_t{1} << 40}) {
    image.width = width;
    show([&] { twinflow::write_png(words[3], image); });
  }
  show([&] { model.encode({}); });
  show([&] { model.encode({{}}); });
  show([&] { model.encode({{1, 259}}); });
  show([&] { model.encode({std::vector<int64_t>(545)}); });
  twinflow::Prompt prompt = model.encode({{1, 2, 3}, {4}});
  show([&] { model.generate(prompt, {}); });
  show([&] { model.generate(prompt, {1, 2, 3}); });
  show([&] { model.generate(prompt, {1, 2}, 64, 64); });
  prompt.embeds.pop_back();
  show([&] { model.generate(prompt, {1, 2}); });
  std::puts(model.tokenizer().c_str());
  return 0;
}
"""
SAID = [
    *["height x width x 3 bytes"] * 3, "no prompts", "0 token ids", "259 is not below 259", "545 token ids",
    "0 seeds for 2 prompts", "3 seeds for 2 prompts", "no program for 64x64", "one length per prompt",
]  # fmt: skip


@pytest.fixture(scope="module")
def user(installed, tmp_path_factory):
    """A project of someone else's: find_package(twinflow_rt_embed) from an install."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "main.cpp").write_text(USER)
    (folder / "CMakeLists.txt").write_text(
        textwrap.dedent("""
            cmake_minimum_required(VERSION 3.24)
            project(user LANGUAGES C CXX)
            find_package(twinflow_rt_embed 0.1 REQUIRED)
            add_executable(user main.cpp)
            target_link_libraries(user PRIVATE twinflow::embed)
        """)
    )
    return build(folder, folder / "build", installed) / "user"


def test_other_projects_use_and_misuse_the_library(user, exported, tmp_path):
    said = run(user, exported, "misuse", tmp_path / "made.png").splitlines()
    for line, message in zip(said, SAID, strict=False):
        assert message in line, (message, line)
    assert json.loads("\n".join(said[len(SAID) :]))["model"]["type"] == "BPE"
    pixels = np.array(Image.open(tmp_path / "made.png"))
    assert np.array_equal(pixels.flatten(), (np.arange(2 * 300 * 3) * 7).astype(np.uint8))


@pytest.mark.parametrize(
    ("cpp", "python"), [("k * k >> 3", lambda k: k * k >> 3), ("k * 2654435761u >> 13", lambda k: k * 2654435761 >> 13)]
)
def test_pngs_hold_every_pixel(built, tmp_path, cpp, python):
    """An image that compresses and noise that does not, encoded under the sanitizers; PIL compares the checksums."""
    (tmp_path / "big.cpp").write_text(
        "#include <twinflow_rt_embed.h>\nint main(int, char** w) { twinflow::Image i{200, 333, "
        "std::vector<uint8_t>(200 * 333 * 3)}; for (size_t k = 0; k < i.pixels.size(); ++k) "
        f"i.pixels[k] = static_cast<uint8_t>({cpp}); twinflow::write_png(w[1], i); }}\n"
    )
    (stb,) = re.findall("^STB_INCLUDE_DIR:PATH=(.*)$", (built / "CMakeCache.txt").read_text(), re.MULTILINE)
    run("c++", "-std=c++17", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
        f"-I{EMBED / 'include'}", "-isystem", stb, tmp_path / "big.cpp", EMBED / "src" / "png.cpp",
        "-o", tmp_path / "big")  # fmt: skip
    run("env", "LD_PRELOAD=", tmp_path / "big", tmp_path / "big.png")
    k = np.arange(200 * 333 * 3, dtype=np.uint64)
    wanted = python(k).astype(np.uint8)
    assert np.array_equal(np.array(Image.open(tmp_path / "big.png")).flatten(), wanted)
