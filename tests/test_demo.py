"""The shipped miniature: its parts are diffusers' and transformers' own, and it draws what it is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from twinflow_rt import cli
from twinflow_rt.evaluate import check, examine
from twinflow_rt.evaluate.detect import detect
from twinflow_rt.loading import DEMO, load
from twinflow_rt.training.scenes import Requirement, Scene, prompts

pytest.importorskip("scipy")
PROMPT = "a green triangle"
SHOWN = (PROMPT, "a red circle")  # the prompts of docstrings, pages, nodes and docs
ROOT = Path(__file__).parents[1]
# docs/demo.png: `twinflow-rt generate` of these, --num-images 6 --seed 0
ROWS = (
    PROMPT, "a purple triangle right of a yellow circle", "a blue circle left of a red square",
    "a black cross right of a green circle",
)  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return load("demo", device="cpu", dtype="float32")


def test_fits_in_ten_megabytes():
    assert 1e6 < sum(p.stat().st_size for p in DEMO.rglob("*")) < 10e6


def test_one_evaluation_draws_what_the_prompt_asks_for(pipe):
    """Objects alone; two at a time it mostly gets wrong (the README says so)."""
    scores = examine(lambda captions: pipe(captions, seed=0, output="np").images, per_kind=16)
    assert scores.per_kind["single"] >= 0.8 and scores.per_kind["colors"] >= 0.8 and scores.mean >= 0.4, str(scores)
    shown = scores.confusion["color"]
    assert sum(n for (asked, seen), n in shown.items() if asked == seen) >= 0.75 * sum(shown.values()), shown


def asked(caption: str) -> Scene:
    """Return what a caption of one object, or of two and their relation, asks for."""
    words = re.fullmatch(r"a (\w+) (\w+)(?: (left of|right of|above|below) a (\w+) (\w+))?", caption)
    assert words, caption
    objects = [Requirement(words[k + 1], words[k]) for k in (1, 4) if words[k]]
    return Scene("position" if words[3] else "colors", caption, (), tuple(objects), words[3])


@pytest.mark.parametrize("file", ["README.md", "Makefile"])
def test_prompts_of_the_readme_are_drawn(pipe, file):
    """What a new user types first comes out right."""
    found = re.findall(r'(?:"|^PROMPT \?= )(a [a-z ]+?)(?:"|$)', (ROOT / file).read_text(), re.M)
    assert found and (file != "README.md" or len(set(found)) >= 4)
    for caption in dict.fromkeys(found):
        verdict = check(pipe(caption, seed=0, output="np").images[0], asked(caption))
        assert verdict.correct, f"{caption}: {verdict.reason}"


def test_the_readmes_picture_is_right():
    from PIL import Image

    with Image.open(ROOT / "docs" / "demo.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    for row, caption in enumerate(ROWS):
        for column in range(6):
            cell = sheet[64 * row : 64 * (row + 1), 64 * column : 64 * (column + 1)]
            verdict = check(np.ascontiguousarray(cell), asked(caption))
            assert verdict.correct, f"{caption}, {column}: {verdict.reason}"


def test_the_picture_of_make_demo(pipe, tmp_path, capsys):
    out = tmp_path / "demo.png"
    assert cli.main(["generate", PROMPT, "--seed", "0", "--device", "cpu", "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size"] == [64, 64]
    from PIL import Image

    scene = next(s for s in prompts("colors", 500) if s.caption == PROMPT)
    with Image.open(out) as image:
        verdict = check(np.asarray(image.convert("RGB")), scene)
    assert verdict.correct, verdict.reason


@pytest.mark.parametrize("prompt", SHOWN)
def test_prompts_that_are_shown_are_drawn(pipe, prompt):
    """Just what is asked for, with at least nine of ten seeds."""
    found = [detect(image) for image in pipe(prompt, seed=0, num_images=10, output="np").images]
    assert sum([f"a {d.color} {d.shape}" for d in each] == [prompt] for each in found) >= 9, found


def test_no_other_prompts_are_shown():
    files = [ROOT / "twinflow_rt" / name for name in ("__init__.py", "serve/page.html", "integrations/comfyui.py")]
    shapes = re.compile(r"""[">']((?:an?|two|three) [a-z ]*(?:circle|square|triangle|cross)[a-z ]*)["<']""")
    for file in (*files, *(ROOT / "docs").glob("*.md")):
        named = set(shapes.findall(file.read_text()))
        assert named <= set(SHOWN) and (named or file not in files), (file.name, named)


def test_seeds_give_different_images(pipe):
    images = pipe("two blue circles", num_images=4, seed=0, output="np").images.astype(float)
    assert all(np.abs(a - b).mean() > 1 for i, a in enumerate(images) for b in images[:i])


def test_folded_equals_unfolded_diffusers(pipe):
    """Every part loads in the libraries it is written for; at one evaluation, where the second time
    embedder vanishes, diffusers' own network gives the same picture."""
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import AutoTokenizer, Qwen3Model

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    encoder = Qwen3Model.from_pretrained(DEMO / "text_encoder", dtype=torch.float32).eval()
    network, info = ZImageTransformer2DModel.from_pretrained(
        DEMO / "transformer", torch_dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and all(k.startswith("t_embedder_2.") for k in info["unexpected_keys"])
    vae = AutoencoderKL.from_pretrained(DEMO / "vae", torch_dtype=torch.float32)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ids = tokenizer(chat, return_tensors="pt").input_ids
        embeds = encoder(input_ids=ids, output_hidden_states=True).hidden_states[-2][0]
        (flow,) = network([z[0][:, None]], torch.zeros(1), [embeds], return_dict=False)[0]
        x0 = z + flow[None, :, 0]
        image = vae.decode(x0 / vae.config.scaling_factor + vae.config.shift_factor).sample
    ours = pipe(PROMPT, seed=0, output="latent").images
    assert (ours - x0).abs().max() <= 1e-4 * x0.abs().max()
    pixels = pipe(PROMPT, seed=0, output="pt").images
    assert (pixels - (image / 2 + 0.5).clamp(0, 1)).abs().max() <= 1e-3
