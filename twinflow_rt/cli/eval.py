"""`twinflow-rt eval`: how often a program finds in a model's images what their prompts asked for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..config import dtype_name
from ..evaluate.check import Scores, examine
from ..evaluate.data import score_data
from ..evaluate.diversity import diversity
from ..evaluate.plot import SCHEMA
from ..evaluate.sheet import contact_sheet
from ..training.scenes import KINDS, Split, prompts

BATCH = 32
SPLITS: tuple[Split, ...] = ("train", "heldout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command, beside those that every command loading a model shares."""
    parser.add_argument("--nfe", type=int, nargs="+", default=[1], metavar="N", help="evaluations per image to compare")
    parser.add_argument("--mode", choices=("few", "any", "multi"), help="sampler rules; default: few up to 8")
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="W", help="classifier-free guidance, for plain flow models"
    )
    parser.add_argument("--per-kind", type=int, default=50, metavar="N", help="captions per kind (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the captions; image k starts from noise seed k")
    parser.add_argument("--diversity", action="store_true", help="also compare the images of one prompt")
    parser.add_argument(
        "--data", action="store_true", help="first score the data itself, drawn and through the VAE (extra: train)"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write prompts, images and verdicts as one picture")
    parser.add_argument("--confusion", action="store_true", help="also print what was shown where another was asked")
    parser.add_argument("--json", action="store_true", help="print scores as JSON, with the confusions")


class Generator:
    """captions -> uint8 images of one sampler setting; image k of a list has noise seed k.

    guidance: of plain flow models, F_empty + guidance * (F_caption - F_empty) (arXiv 2207.12598), two
    evaluations a step; 1 is off, as TwinFlow models are run.
    """

    def __init__(self, pipe: Any, sampler: Any, guidance: float = 1.0) -> None:
        self.pipe, self.sampler, self.guidance = pipe, sampler, guidance

    def __call__(self, captions: list[str]) -> np.ndarray:
        batches = []
        for start in range(0, len(captions), BATCH):
            part = captions[start : start + BATCH]
            seeds = list(range(start, start + len(part)))
            if self.guidance == 1:
                batches.append(self.pipe(part, seed=seeds, sampler=self.sampler, output="np").images)
            else:
                batches.append(self._guided(part, seeds))
        return np.concatenate(batches)

    def _guided(self, captions: list[str], seeds: list[int]) -> np.ndarray:
        import torch

        from ..sampling.noise import initial_noise, step_noise
        from ..sampling.sampler import sample, schedule

        pipe, vae = self.pipe, self.pipe.vae
        with torch.inference_mode():
            pipe.program.refold(schedule(self.sampler, pipe.dtype))
            network = pipe.program.network
            context = pipe._context((*captions, *[""] * len(captions)), 1)

            def velocity(x: Any, step: int) -> Any:
                asked, empty = network(torch.cat((x, x)), network.step_modulation(step), context).chunk(2)
                return torch.lerp(empty, asked, self.guidance)

            height, width = (n // vae.scale for n in pipe.sizes.resolve(None, None))
            shape = (vae.channels, height, width)
            noise = initial_noise(seeds, shape, pipe.dtype, pipe.device)
            fresh = lambda step: step_noise(seeds, step, shape, device=pipe.device)
            images: np.ndarray = vae.decode_uint8(sample(velocity, noise, self.sampler, noise_fn=fresh)).cpu().numpy()
            return images


def run(args: argparse.Namespace, pipe: Any) -> int:
    """Scores `pipe` at every asked-for number of evaluations and prints one line each."""
    from ..sampling.schedule import preset
    from .image_files import check_image_path

    if args.sheet is not None:
        check_image_path(args.sheet, "--sheet")
    rows: list[dict[str, Any]] = []

    def add(of: dict[str, Any], scores: Scores) -> None:
        confusion = {what: [[*pair, n] for pair, n in counts.items()] for what, counts in scores.confusion.items()}
        row = {**of, "images": scores.images, "mean": scores.mean, **scores.per_kind, "confusion": confusion}
        rows.append(row)
        if not args.json:
            print(_line(row, header=len(rows) == 1), flush=True)
            if args.confusion:
                print(_confusions(scores), flush=True)

    if args.data:
        for kind, scores in score_data(pipe.folder / "vae", args.per_kind, args.seed).items():
            add({"nfe": 0, "captions": kind}, scores)
    for nfe in args.nfe:
        generate = Generator(pipe, preset(nfe, args.mode), args.guidance)
        for split in SPLITS:
            add({"nfe": nfe, "captions": split}, examine(generate, args.per_kind, split, args.seed))
        if args.diversity:
            rows[-1]["diversity"], rows[-1]["diversity_of_data"] = spread = diversity(generate, seed=args.seed)
            if not args.json:
                print("     pairwise distance {:.1f}, of the data {:.1f}".format(*spread), flush=True)
    if args.json:
        report = {
            "schema": SCHEMA, "model": args.model, "dtype": dtype_name(pipe.dtype),
            "precision": pipe.program.plan.precision, "exempt": list(pipe.program.plan.exempt), "mode": args.mode,
            "guidance": args.guidance, "seed": args.seed, "rows": rows,
        }  # fmt: skip
        print(json.dumps(report, indent=1))
    if args.sheet is not None:
        sheet(Generator(pipe, preset(args.nfe[0], args.mode), args.guidance), args.sheet)
    return 0


def sheet(generate: Generator, path: Path, columns: int = 6) -> None:
    """One row of prompts, images and verdicts per kind."""
    scenes = [s for kind in KINDS for s in prompts(kind, columns, "train", seed=1)]
    from .image_files import save_image

    image = contact_sheet(list(generate([s.caption for s in scenes])), scenes, columns=columns)
    save_image(image, path)


def _line(row: dict[str, Any], header: bool) -> str:
    names = ("mean", *KINDS)
    line = f"{row['nfe']:>4} {row['captions']:<8}" + "".join(f"{row[n]:>12.3f}" for n in names)
    return f"{'nfe':>4} {'captions':<8}" + "".join(f"{n:>12}" for n in names) + "\n" + line if header else line


def _confusions(scores: Scores) -> str:
    """One line for each thing that was asked for, with what was found instead, most often first."""
    lines = []
    for of, counts in scores.confusion.items():
        for asked in sorted({str(a) for a, _ in counts}):
            shown = {s: n for (a, s), n in counts.items() if str(a) == asked}
            ranked = sorted(shown.items(), key=lambda pair: -pair[1])
            lines.append(f"     {of} {asked}: " + ", ".join(f"{'nothing' if s is None else s} {n}" for s, n in ranked))
    return "\n".join(lines)
