"""Sequence parallelism: two processes give the images of one; and what cannot be split says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests import factory, qwen_image_factory, sana_factory
from twinflow_rt.errors import ConfigError
from twinflow_rt.loading import load
from twinflow_rt.models.token_split import WHOLE
from twinflow_rt.runtime.parallel import Keys, Ulysses

PROCESSES = 2
# (family, (height, width) in pixels, prompts): token counts that do not halve, prompts of unequal length
CASES = (
    ("z-image", (56, 72), ["a red circle", "a much longer caption about two small blue squares beside it"]),
    ("z-image", (64, 64), ["a red circle"]), ("qwen-image", (48, 80), ["a red circle", "two blue squares"]),
    ("qwen-image", (48, 48), ["one"]),
)  # fmt: skip


def run(pipe, family: str) -> dict[str, torch.Tensor]:
    """Latents of every case of a family, at one evaluation and (recompiled, other constants) at two."""
    out = {}
    for i, (of, (height, width), prompts) in enumerate(CASES):
        if of == family:
            for nfe in (1, 2):
                result = pipe(prompts, height=height, width=width, seed=3, nfe=nfe, output="latent")
                out[f"{i}.{nfe}"] = result.images.contiguous()
    return out


def worker(rank: int, folder: Path) -> None:
    """One of the processes: loads both models, splits them, runs every case."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    for family in ("z-image", "qwen-image"):
        pipe = load(folder / family, device="cpu")
        pipe.parallelize()
        results = run(pipe, family)
        if family == "z-image":
            results["drawn"] = pipe("a", output="latent").images  # no seed: the first process's
        save_file(results, folder / f"{family}-{rank}.safetensors")
    refusals = []
    for call in (
        lambda: pipe("a", cancel=lambda: False),
        lambda: pipe("a", on_oom="split"),
        pipe.parallelize,
        load(folder / "sana", device="cpu").parallelize,
        lambda: Ulysses().require(9),
    ):
        try:
            call()
        except ConfigError as error:
            refusals.append(str(error))
    (folder / f"refusals-{rank}").write_text("\n".join(refusals))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model folders, and what two processes wrote beside them."""
    folder = tmp_path_factory.mktemp("parallel")
    factory.make_model(folder / "z-image")
    qwen_image_factory.make_model(folder / "qwen-image")
    sana_factory.make_model(folder / "sana")
    code = "import sys; from pathlib import Path; from tests.runtime.test_parallel import worker; "
    code += "worker(int(sys.argv[1]), Path(sys.argv[2]))"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(folder)], env=env) for rank in range(PROCESSES)
    ]
    try:
        assert [p.wait(timeout=300) for p in processes] == [0] * PROCESSES
    finally:
        for p in processes:
            p.kill()
    return folder


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_two_processes_give_the_latents_of_one(folder, family):
    alone = run(load(folder / family, device="cpu"), family)
    ranks = [load_file(folder / f"{family}-{rank}.safetensors") for rank in range(PROCESSES)]
    assert alone
    for case, expected in alone.items():
        assert torch.equal(ranks[0][case], ranks[1][case]), case
        # products of half as many rows may sum in another order: nothing else differs
        assert (ranks[0][case] - expected).abs().max() <= 2e-6 * expected.abs().max(), case


def test_seeds_left_open_are_the_first_process_s(folder):
    first, second = (load_file(folder / f"z-image-{rank}.safetensors")["drawn"] for rank in range(PROCESSES))
    assert torch.equal(first, second)


def test_what_cannot_be_split_is_refused_by_every_process(folder):
    for rank in range(PROCESSES):
        cancel, split, twice, family, heads = (folder / f"refusals-{rank}").read_text().splitlines()
        assert "cancel" in cancel and "on_oom" in split and "already" in twice
        assert "sana" in family and "Qwen-Image" in family
        assert "9 attention heads" in heads and "[1, 3, 9]" in heads


def test_without_a_process_group_it_says_how_to_start(folder):
    with pytest.raises(ConfigError, match="torchrun"):
        load(folder / "z-image", device="cpu").parallelize()


def test_keys_name_the_real_tokens_of_all_shares_in_order():
    ulysses = object.__new__(Ulysses)
    vars(ulysses).update(group=None, size=2, rank=0)
    joint = torch.arange(1, 9)[None, :, None]  # an image of 5 tokens, a prompt of 3
    shares = []
    for rank in range(2):
        vars(ulysses)["rank"] = rank
        shares.append(ulysses.share(joint, 5, 3))
    assert shares[0].flatten().tolist() == [1, 2, 3, 6, 7] and shares[1].flatten().tolist() == [4, 5, 0, 8, 0]
    keys = ulysses.keys(None, 5, 3)
    assert isinstance(keys, Keys) and torch.equal(torch.cat(shares, 1)[:, keys.order], joint)
    assert torch.equal(WHOLE.share(joint, 5, 3), joint) and WHOLE.keys(None, 5, 3) is None
